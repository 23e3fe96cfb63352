"""A quiet Trainer of a few steps on the CPU, for modules that are trained or tested."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from mergekit_lit.lit.data import TaskDataModule


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
