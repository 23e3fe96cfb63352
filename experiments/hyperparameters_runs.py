"""This file is the configurations of `experiments/hyperparameters.py`, and what its YAML may say.

It is a module, not a command.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from inputs import (
    COUNT,
    GROUPS,
    LIST,
    MAPPING,
    NATURAL,
    NUMBER,
    SEEDS,
    SHARE,
    STEPS,
    WORD,
    WORDS,
    built,
    check_keys,
    read_settings,
)
from testbed import Place, Recorded, Testbed, groups_of, testbed_of

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.optimization import ScheduleName
from mergekit_lit.theory.effort import Effort

_KEYS = {
    "suite": WORD,
    "tasks": WORDS,
    "seeds": SEEDS,
    "schedule": WORD,
    "warmup_steps": NATURAL,
    "images": COUNT,
    "effort": MAPPING,
    "groups": GROUPS,
    "more_groups": GROUPS,
    "configurations": MAPPING,
}
_FACTORS = {"lr": NUMBER, "batch": COUNT, "train_share": SHARE, "steps": STEPS}


@dataclass(frozen=True, kw_only=True)
class Run(Recorded):
    """One configuration of one backbone and seed, for all tasks and step counts."""

    backbone: str
    suite: str
    tasks: tuple[str, ...]
    seed: int
    schedule: str
    warmup_steps: int
    lr: float
    batch: int
    train_share: float
    steps: tuple[int, ...]
    images: int
    effort: Effort
    groups: tuple[tuple[str, ...], ...]
    out: Path

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return f"{self.schedule}-lr{self.lr:g}-b{self.batch}-share{self.train_share:g}"

    @property
    def folder(self) -> Path:
        """Where its experts lie."""
        return self.out / f"{self.backbone.replace('/', '-')}-{self.seed}" / self.name

    @property
    def record(self) -> Path:
        """Where its record lies, once it is made."""
        return self.folder / "hyperparameters.json"

    @property
    def testbed(self) -> Testbed:
        """Base and images."""
        return testbed_of(
            Place(
                backbone=self.backbone,
                suite=self.suite,
                seed=self.seed,
                train_share=self.train_share,
                images=self.images,
            )
        )


def sweep_of(path: Path, *, suite: str | None = None) -> dict[str, Any]:
    """Return what the YAML of a sweep says, with another suite if one is given."""
    return read_settings(path, _KEYS, optional=("tasks",), suite=suite)


def runs_of(settings: Mapping[str, Any], out: Path) -> list[Run]:
    """Return every run of a file: seed by seed, the centre first.

    Raises:
        KeyError: an unknown suite, task or key.
        ValueError: a value that is not what it must be.
    """
    suite = settings["suite"]
    tasks = load_suite(suite).chosen(settings.get("tasks"))
    found = []
    for seed in settings["seeds"]:
        for backbone, listed in settings["configurations"].items():
            for index, chosen in enumerate(_configurations(backbone, listed)):
                sizes = settings["groups"] | ({} if index else settings["more_groups"])
                groups = [g for size, n in sizes.items() for g in groups_of(tasks, size, n)]
                run = Run(
                    backbone=backbone,
                    suite=suite,
                    tasks=tasks,
                    seed=seed,
                    schedule=settings["schedule"],
                    warmup_steps=settings["warmup_steps"],
                    images=settings["images"],
                    effort=built("`effort`", Effort, settings["effort"]),
                    groups=tuple(groups),
                    out=out,
                    **{**chosen, "steps": tuple(chosen["steps"])},
                )
                _check_schedule(run)
                found.append(run)
    return found


def _configurations(backbone: str, listed: Any) -> list[dict[str, Any]]:
    """Return the centre, and the others with what they leave to it."""
    where = f"a configuration of {backbone!r}"
    if not LIST.holds(listed):
        raise ValueError(f"The configurations of {backbone!r} must be {LIST.told}.")
    centre = check_keys(f"the first configuration of {backbone!r}", listed[0], _FACTORS)
    others = [check_keys(where, each, _FACTORS, optional=_FACTORS) for each in listed[1:]]
    return [centre, *({**centre, **changed} for changed in others)]


def _check_schedule(run: Run) -> None:
    if run.schedule not in get_args(ScheduleName):
        raise ValueError(unknown_name("schedule", run.schedule, get_args(ScheduleName)))
    # One trajectory serves all step counts at a constant rate; else each is one of its own.
    least = max(run.steps) if run.schedule == "constant" else min(run.steps)
    if run.warmup_steps >= least:
        raise ValueError(
            f"`warmup_steps` must be less than the steps of a training, {least}, but is "
            f"{run.warmup_steps}. Train longer or warm up for less."
        )
