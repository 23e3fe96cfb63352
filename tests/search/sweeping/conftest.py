"""What tests of sweeps share: a job that takes no time, and fails when it is told to."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.jobs import Cost
from mergekit_lit.search.sweeping.plan import plan_runs
from mergekit_lit.search.sweeping.worker import Sweep


@dataclass
class Sums:
    """A job whose runs add `a` and `b`; `steps`, where a `path` allows, share a run."""

    errors: dict[int, list[Exception]] = field(default_factory=dict)
    begun: list[dict[str, Any]] = field(default_factory=list)
    completed: int = 0
    cost: bool = True
    gpu: bool = False
    trials: int = 0
    stage: str = "sum"
    metrics: tuple[str, ...] = ("sum",)

    def kind(self, point):
        return point.get("kind")

    def followed(self, base):
        return dict

    def complete(self, point):
        self.completed += 1
        config = {"a": 0.0, "b": 0, "steps": [1], "path": "constant", "out": "."}
        unknown = set(point) - set(config) - {"kind"}
        if unknown:
            raise ValueError(f"No parameter named {min(unknown)!r}.")
        steps = point.get("steps", 1)
        given = {**config, **point, "steps": steps if isinstance(steps, list) else [steps]}
        return {**given, "a": float(given["a"])}

    def separate(self, config):
        return [config]

    def identity(self, config):
        shared = config["path"] == "constant"
        names = {"a", "b", "path"} | (set() if shared else {"steps"})
        return {name: config[name] for name in names}, tuple(config["steps"])

    def is_done(self, folder, steps):
        return (folder / "sum.json").is_file()

    def execute(self, config, folder, steps):
        self.begun.append(config)
        for error in self.errors.get(config["b"], [])[:1]:
            self.errors[config["b"]].pop(0)
            raise error
        (folder / "sum.json").write_text(json.dumps(config["a"] + config["b"]))

    def cost_kind(self, config):
        return config["path"]

    def on_gpu(self, config):
        return self.gpu

    def trial(self, config, folder):
        self.trials += 1
        assert folder.is_dir()
        slow = config["path"] == "cosine"
        return (
            None
            if not self.cost
            else Cost(start_s=36.0, step_s=7.2 if slow else 3.6, result_bytes=10**6)
        )

    def rows(self, folder):
        return [{"sum": json.loads((folder / "sum.json").read_text()), "file": "sum.json"}]


@pytest.fixture
def sums() -> type[Sums]:
    return Sums


@pytest.fixture
def sweep_of(tmp_path) -> Callable[..., Sweep]:
    """Makes a sweep of axes over `Sums`, in a folder of its own."""

    def make(axes: Any, job: Sums | None = None, out: Path | None = None, **settings: Any) -> Sweep:
        job = job or Sums()
        plan = plan_runs(read_axes(axes), job)
        settings = {"begun": 0.0, **settings}
        return Sweep(plan=plan, job=job, out=out or tmp_path / "sweep", **settings)

    return make
