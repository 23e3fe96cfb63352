"""A quiet Trainer of a few steps on the CPU, and small experts, tasks and data that it is given."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.params import add
from mergekit_lit.data.splits import Images, TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.models.backbones import Backbone, load_base


def _quiet_trainer(**arguments: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **arguments})


def _fit(
    module: LightningModule,
    data: TaskDataModule,
    *,
    steps: int = 3,
    resume: Any = None,
    **trainer: Any,
) -> Any:
    """Train for `steps` steps and return the module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        settings = {"max_steps": steps, "limit_val_batches": 0, "log_every_n_steps": 1, **trainer}
        _quiet_trainer(**settings).fit(module, datamodule=data, ckpt_path=resume)
    return module


@pytest.fixture
def quiet_trainer() -> Callable[..., Trainer]:
    """Makes a Trainer that prints and writes nothing."""
    return _quiet_trainer


@pytest.fixture
def fit() -> Callable[..., Any]:
    """Trains a module on its task and returns it."""
    return _fit


@pytest.fixture
def scored() -> Callable[..., Any]:
    """Tests a module and returns what it logged."""

    def test(module: LightningModule, data: Any, **trainer: Any) -> Any:
        return _quiet_trainer(**trainer).test(module, datamodule=data, verbose=False)[0]

    return test


@pytest.fixture
def dots(tiny_suite: str) -> Callable[..., TaskDataModule]:
    """Makes the data of one tiny task."""
    return lambda **changes: TaskDataModule(
        tiny_suite, "dots", **{"batch": 12, "reserve": 8, **changes}
    )


TASKS = ("dots", "stripes")


@pytest.fixture(scope="module")
def family() -> tuple[Backbone, Base, list[Expert]]:
    """A small backbone, its base, and an expert of each tiny task with a random head."""
    backbone, base = load_base("resnet@random:0", image_size=8)
    return backbone, base, [_expert(base, backbone.features, task) for task in TASKS]


def _expert(base: Base, features: int, task: str, size: float = 0.02) -> Expert:
    draw = torch.Generator().manual_seed(len(task))
    step = {
        name: size * torch.randn(tensor.shape, generator=draw)
        for name, tensor in base.params.items()
        if base.structure[name].is_merged
    }
    head = {"weight": torch.randn(3, features, generator=draw), "bias": torch.zeros(3)}
    card = Card(task=task, base=base.name, backbone=base.backbone, image_size=8)
    return Expert(add(base.params, step), head, base.structure, card)


@pytest.fixture
def merge_data(tiny_suite: str) -> Callable[..., MergeDataModule]:
    """Makes a data module of the tiny suite that is set up."""

    def make(**options: Any) -> MergeDataModule:
        data = MergeDataModule(tiny_suite, **{"batch": 7, "reserve": 4, **options})
        data.setup()
        return data

    return make


@pytest.fixture
def small_task() -> Callable[..., TaskData]:
    """Makes a task of a few random images, the same in every split."""
    return _task


def _task(n: int = 40, classes: int = 3, **labels: int) -> TaskData:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    images = Images(x, np.arange(n) % labels.get("label", classes))
    return TaskData(
        name="dots",
        suite="tiny",
        classes=tuple("abcdefgh"[:classes]),
        train=images,
        val=images,
        test=images,
        reserve=images,
        split_hash="0",
    )
