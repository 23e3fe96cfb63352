"""This file says what a sweep must know of the job that it repeats; the command line has them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mergekit_lit.lit.lockstep import Pace
from mergekit_lit.search.sweeping.axes import Point

Config: TypeAlias = dict[str, Any]
"""A complete configuration by dotted key, such as `model.lr`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs.

    Attributes:
        start_s: seconds of one core, whatever the number of steps.
        step_s: seconds of one step.
        result_bytes: of one expert or model on disk, with all that lies beside it.
        on_gpu: whether a GPU is held meanwhile.
    """

    start_s: float
    step_s: float = 0.0
    result_bytes: float
    on_gpu: bool = False


Task: TypeAlias = tuple[Config, Path, Sequence[int]]
"""What a run is executed with: configuration, folder, steps."""


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Which runs can be done at once, with one pass for all, and whether that may be faster.

    Attributes:
        kind: what agrees among them.
        execute: does several runs of one kind and returns the error of each that failed; what it
            finds out about the faster way stands in the pace afterwards.
        obstacle: why a run can only be done alone, if so: then nothing else is told.
        may_pay: whether it is worth a try.
        on_gpu: whether a GPU works.
    """

    kind: str = ""
    execute: Callable[[Sequence[Task], Pace], list[Exception | None]] | None = None
    obstacle: str = ""
    may_pay: bool = False
    on_gpu: bool = False


class Job(Protocol):
    """One stage as a sweep sees it; sent to worker processes, so it can be pickled.

    A run is named by the hash of what decides its results, which `identity` tells. `steps` are the
    counts K after which a run leaves an expert; empty for jobs without.
    """

    @property
    def stage(self) -> str:
        """The stage's name: `train`, `merge` or `evaluate`."""

    @property
    def metrics(self) -> Sequence[str]:
        """What `rows` tell that is worth making large or small."""

    def kind(self, point: Mapping[str, Any]) -> Hashable:
        """Return what decides all of a configuration but a point's own values.

        Such as the merge method, which has parameters of its own.
        """

    def followed(self, base: Config) -> Callable[[Point], Point]:
        """Return what tells a point's values together with those that the file makes of them.

        Args:
            base: complete configuration of a point with the same keys, of the same kind.
        """

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default.

        Raises:
            ValueError: an unknown key, or a wrong or missing value.
        """

    def separate(self, config: Config) -> Sequence[Config]:
        """Return the configurations of one run each: a configuration may name several tasks."""

    def identity(self, config: Config) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        """Return what decides the trajectory of a run, and its steps.

        Configurations that agree in the first share one run, whose steps are those of all.
        """

    def is_done(self, folder: Path, steps: Sequence[int]) -> bool:
        """Return whether the records in a run's folder say that all of it is done."""

    def execute(self, config: Config, folder: Path, steps: Sequence[int]) -> None:
        """Do what is not done yet, from the last checkpoint on if there is one."""

    def alike(self, config: Config) -> Alike:
        """Return with which runs this one can be done at once."""

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """Return the results in a run's folder: one row an expert or model, with its `file`."""

    def cost_kind(self, config: Config) -> Hashable:
        """Return what decides how long a step, or a run, takes."""

    def on_gpu(self, config: Config) -> bool:
        """Return whether a run holds a GPU."""

    def trial(self, config: Config, folder: Path) -> Cost | None:
        """Return what a run costs, measured on a short one; None where only the whole one tells."""
