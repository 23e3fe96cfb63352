"""What the contract of merge methods is checked with: tiny networks, images, and a plug-in."""

import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, get_args

import pytest
import torch

from mergekit_lit.core.calibration import Batch, Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import engine
from mergekit_lit.merging.configuration import parameters
from mergekit_lit.models.capture import network


class TinyNet(torch.nn.Module):
    """A network whose tensors are those of the tiny experts."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.norm.register_parameter("bias", None)
        self.block = torch.nn.Linear(5, 7)
        self.token = torch.nn.Parameter(torch.zeros(1, 1))
        self.logit_scale = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        pooled = self.norm(self.stem(x.to(self.stem.weight.dtype))).relu().mean((2, 3))
        token = self.token.expand(len(x), 1)
        return self.logit_scale * self.block(torch.cat([pooled, token], dim=1))


NETWORK = TinyNet()


class TinySamples:
    """Twelve random images, labels included; it tells how many threads looked at them."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(12, 3, 5, 5, generator=draw, dtype=torch.float64)
        self.threads: set[int] = set()

    def __len__(self):
        return 12

    def take(self, positions):
        self.threads.add(torch.get_num_threads())
        return Batch(self.inputs[positions], positions % 2)


def tiny_calibration(experts: Experts, split: str) -> Calibration:
    """Return images and heads that follow the experts' travels, whatever their order and names."""
    seeds = {
        name: int(card.travel) for name, card in zip(experts.names, experts.cards, strict=True)
    }
    heads = {
        name: torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for name, seed in seeds.items()
    }
    return Calibration(
        split=split,
        samples={name: TinySamples(seed) for name, seed in seeds.items()},
        expert=network(NETWORK),
        merged=network(NETWORK, batch_statistics=True),
        logits=lambda task, features: features @ heads[task].to(features.dtype).T,
    )


class Subject:
    """A registered method, with what it is tried on."""

    def __init__(
        self,
        method: str,
        make_experts: Callable[..., Experts],
        threads: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self.method = method
        self.entry = MERGE_METHODS.get(method)
        self.parameters = parameters(self.entry.function)
        self.any = make_experts
        self.threads = threads
        self.low, self.high = self.entry.facts.get("experts", (1, None))

    def __call__(self, count: int = 3, **options: Any) -> Experts:
        """Make tiny experts, as many as asked for or as the method can take."""
        fitting = max(self.low, count if self.high is None else min(count, self.high))
        return self.any(fitting, **options)

    @property
    def split(self) -> str | None:
        """The split of images that it looks at, if any."""
        data = self.entry.facts["data"]
        return data if data in get_args(DataSplit) else None

    def calibration(self, experts: Experts) -> Calibration:
        return tiny_calibration(experts, str(self.split))

    def merge(self, experts: Experts, **options: Any) -> Merged:
        """Merge as the engine does, with images for the methods that look at some."""
        if self.split:
            options = {"calibration": self.calibration(experts), **options}
            if "steps" in self.parameters:
                options["config"] = {"steps": 3, **options.get("config", {})}
        return engine.merge(experts, self.method, **options)

    def finite(self, experts: Experts, **options: Any) -> Merged:
        """Merge, and see that every number of every task's model is one."""
        merged = self.merge(experts, **options)
        for params in (merged.shared, *(merged.for_task(task) for task in merged.tasks)):
            assert all(bool(tensor.isfinite().all()) for tensor in params.values())
        return merged


@pytest.fixture
def subject(make_experts, threads) -> Callable[[str], Subject]:
    return lambda method: Subject(method, make_experts, threads)


PLUG_IN = '''
    from mergekit_lit.core.registry import MERGE_METHODS


    def count(pairs):
        return {"tensors": sum(1 for _ in pairs)}


    @MERGE_METHODS.add(
        form="kernel",
        family="sparsifying",
        data="none",
        source="Nobody 2026, eq. 1",
        search={"scale": (0.0, 1.0)},
        prepare=count,
    )
    def largest_of_all(tensor, *, scale: float = 0.5):
        """Take each entry from the expert that moved it most.

        Args:
            tensor: deltas (T, *s).
            scale: length of the step, at least 0.

        Source: Nobody 2026, eq. 1.
        """
        if scale < 0:
            raise ValueError(f"`scale` must be at least 0, but is {scale}.")
        assert tensor.stats["tensors"] in (4, 6)  # some are kept in one of the checks
        order = tensor.deltas.abs().argmax(dim=0, keepdim=True)
        return scale * tensor.deltas.gather(0, order)[0]
'''


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a second distribution whose entry point registers `largest_of_all`."""
    (tmp_path / "merge_plug_in.py").write_text(textwrap.dedent(PLUG_IN))
    facts = tmp_path / "merge_plug_in-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: merge-plug-in\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[mergekit_lit.merge_methods]\nlargest = merge_plug_in\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # As in a new process: nothing is looked up yet. What the plug-in adds goes when the test ends.
    monkeypatch.setattr(MERGE_METHODS, "_loaded", False)
    monkeypatch.setattr(MERGE_METHODS, "_entries", dict(MERGE_METHODS._entries))
    yield "largest_of_all"
    sys.modules.pop("merge_plug_in", None)
