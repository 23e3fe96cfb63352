"""What every test shares: one thread, no network, a guard on speed, and tiny experts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Two threads on a busy machine were seen to be 20 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import numpy as np
import torch

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Base, Expert, Experts
from mergekit_lit.core.params import add
from mergekit_lit.core.specs import Computed, Spec
from mergekit_lit.core.structure import TensorInfo

if TYPE_CHECKING:
    from mergekit_lit.models.backbones import Backbone

# An unmarked test may take 2 s of processor time; three times that is left for slower machines.
SLOWEST_UNMARKED_S = 6.0


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a slow unmarked test, by processor time: a busy machine must not fail it."""
    start = time.process_time()
    result = yield
    spent = time.process_time() - start
    if spent > SLOWEST_UNMARKED_S and item.get_closest_marker("slow") is None:
        pytest.fail(f"took {spent:.1f} s of processor time: make it faster or mark it slow")
    return result


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """Lets torch compute with so many threads inside."""
    return computing_threads


TINY_STRUCTURE = {
    "stem.weight": TensorInfo("convolution", 0, "stem", ("stem", None, None, None)),
    "norm.weight": TensorInfo("norm", 0, "stem", ("stem",)),
    "norm.running_mean": TensorInfo("statistic", 0, "stem", ("stem",)),
    "norm.running_var": TensorInfo("statistic", 0, "stem", ("stem",)),
    "norm.num_batches_tracked": TensorInfo("counter", 0, "stem"),
    "block.weight": TensorInfo("linear", 1, "block", ("features", None)),
    "block.bias": TensorInfo("linear", 1, "block", ("features",)),
    "token": TensorInfo("embedding", 1, "block"),
    "logit_scale": TensorInfo("other", 1, "block"),
}


def tiny_base(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a base with tensors of 0, 1 and odd sizes, a convolution, and BatchNorm buffers."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "stem.weight": torch.randn(4, 3, 3, 3, generator=draw, dtype=torch.float64).to(dtype),
        "norm.weight": torch.ones(4, dtype=dtype),
        "norm.running_mean": torch.zeros(4, dtype=dtype),
        "norm.running_var": torch.ones(4, dtype=dtype),
        "norm.num_batches_tracked": torch.tensor(7),
        "block.weight": torch.randn(7, 5, generator=draw, dtype=torch.float64).to(dtype),
        "block.bias": torch.randn(7, generator=draw, dtype=torch.float64).to(dtype),
        "token": torch.randn(1, 1, generator=draw, dtype=torch.float64).to(dtype),
        "logit_scale": torch.tensor(2.5, dtype=dtype),
    }


def tiny_tuned(
    base: dict[str, torch.Tensor], seed: int, size: float = 0.1
) -> dict[str, torch.Tensor]:
    """Return a tuned copy of `base`, moved by normal noise of the given size."""
    draw = torch.Generator().manual_seed(1000 + seed)
    tuned = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            tuned[name] = tensor + 10 * seed
            continue
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        moved = tensor.double() + size * noise
        tuned[name] = (moved.abs() if name.endswith("running_var") else moved).to(tensor.dtype)
    return tuned


def make_tiny_experts(
    count: int = 3, dtype: torch.dtype = torch.float64, size: float = 0.1
) -> Experts:
    """Return experts over `tiny_base`, with cards that hold a travel and heads of 2 classes."""
    base = tiny_base(dtype)
    return Experts(
        base=base,
        tuned=[tiny_tuned(base, seed, size) for seed in range(count)],
        structure=TINY_STRUCTURE,
        cards=[Card(task=f"task{i}", travel=1.0 + i, steps=10, lr=0.1) for i in range(count)],
        heads=[{"weight": torch.zeros(2, 7), "bias": torch.zeros(2)} for _ in range(count)],
        names=[f"task{i}" for i in range(count)],
        base_name="tiny",
        base_hash="0" * 64,
        backbone="tiny",
        image_size=8,
    )


@pytest.fixture
def tiny_experts() -> Experts:
    """Three float64 experts with tensors of every awkward size."""
    return make_tiny_experts()


@pytest.fixture
def make_experts() -> Callable[..., Experts]:
    """`make_tiny_experts`, for tests that need another number, dtype or size of experts."""
    return make_tiny_experts


def headers(params: Mapping[str, torch.Tensor]) -> Computed:
    """Return tensors of which names, types and shapes are known, and that fail when read."""
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in params.items()}
    return Computed(specs, lambda name: pytest.fail(f"{name} was read"))


@pytest.fixture
def headers_of() -> Callable[[Experts], Experts]:
    """Makes experts of which nothing may be read, for what must look at headers alone."""

    def make(experts: Experts) -> Experts:
        return replace(
            experts,
            base=headers(experts.base),
            tuned=[headers(tuned) for tuned in experts.tuned],
            heads=[headers(head) for head in experts.heads],
        )

    return make


TINY_TASKS = ("dots", "stripes")


@dataclass
class Family:
    """A network, its base, and an expert of each task of the tiny suite, in files if asked for."""

    backbone: "Backbone"
    base: Base
    experts: list[Expert]
    paths: list[Path] = field(default_factory=list)

    def save(self, folder: Path) -> "Family":
        self.paths = [folder / f"{expert.name}.safetensors" for expert in self.experts]
        for path, expert in zip(self.paths, self.experts, strict=True):
            save_expert(path, expert)
        return self


def make_tiny_family(spec: str, *, image_size: int | None = 32, length: float = 0.02) -> Family:
    """Return experts of a base by its spec, moved at random, with random heads of 3 classes."""
    # Here, because it takes seconds that most tests need not wait.
    from mergekit_lit.models.backbones import load_base

    backbone, base = load_base(spec, image_size=image_size)
    experts = []
    for seed, task in enumerate(TINY_TASKS):
        draw = torch.Generator().manual_seed(seed)
        step = {
            name: length * torch.randn(tensor.shape, generator=draw)
            for name, tensor in base.params.items()
            if tensor.is_floating_point()
        }
        step |= {name: tensor.abs() for name, tensor in step.items() if name.endswith("_var")}
        head = {"weight": torch.randn(3, backbone.features, generator=draw), "bias": torch.zeros(3)}
        card = Card(
            task=task,
            base=spec,
            base_hash=base.content,
            backbone=base.backbone,
            image_size=base.image_size,
            travel=1.0 + seed,
        )
        experts.append(Expert(add(base.params, step), head, base.structure, card))
    return Family(backbone, base, experts)


@pytest.fixture(scope="session")
def make_family() -> Callable[..., Family]:
    """`make_tiny_family`, for tests of real networks."""
    return make_tiny_family


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with two learnable tasks of 3 classes: 120 training and 30 test images of 8 x 8."""
    folder = tmp_path_factory.mktemp("tiny_suite")
    for seed, name in enumerate(TINY_TASKS):
        draw = np.random.default_rng(seed)
        y = np.arange(150) % 3
        patterns = draw.integers(60, 200, (3, 8, 8, 3))
        x = (patterns[y] + draw.integers(-55, 56, (150, 8, 8, 3))).astype(np.uint8)
        split = (np.arange(150) >= 120).astype(np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=y, split=split, classes=np.array(["a", "b", "c"]))
    return str(folder)


@dataclass
class OfflineRun:
    """What one offline file of W&B holds, as W&B's own reader tells it."""

    run: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    artifacts: list[dict] = field(default_factory=list)
    alerts: list[dict] = field(default_factory=list)
    exit_code: int | None = None

    def artifact(self, name: str) -> dict:
        (found,) = [each for each in self.artifacts if each["name"] == name]
        return found

    def made(self) -> list[str]:
        """Names of the models that the run made."""
        return [a["name"] for a in self.artifacts if "_table" not in a["type"] and not used(a)]

    def used(self) -> list[str]:
        """Names of the models that it used."""
        return [a["name"] for a in self.artifacts if used(a)]


def used(artifact: Mapping) -> bool:
    return bool(artifact.get("use_after_commit"))


@pytest.fixture
def offline_runs() -> Callable[[Path], list[OfflineRun]]:
    """Reads the offline runs below a folder by `wandb leet inspect`, the first to end first."""

    def read(folder: Path) -> list[OfflineRun]:
        # Not by the folders' names: they tell whole seconds, in which two runs may begin.
        files = sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        return [_read_offline(file) for file in files]

    return read


def _read_offline(file: Path) -> OfflineRun:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = OfflineRun()
    for record in map(json.loads, told.splitlines()):
        value = record[record["type"]]
        match record["type"]:
            case "run":
                found.run = value
                found.config |= value["config"]["update"]
            case "config" | "summary" as kind:
                getattr(found, kind).update(value.get("update", {}))
            case "history":
                found.history.append(value["item"])
            case "artifact":
                found.artifacts.append(value)
            case "alert":
                found.alerts.append(value)
            case "exit":
                found.exit_code = value["exit_code"]
    return found
