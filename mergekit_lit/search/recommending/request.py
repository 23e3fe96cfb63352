"""This file is what a recommendation is asked for, and what is refused before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mergekit_lit.core.registry import MERGE_METHODS, unknown_name
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.heads import head_kind
from mergekit_lit.search.recommending.budget import Shares
from mergekit_lit.search.recommending.site import Setting
from mergekit_lit.search.recommending.space import Space

Aim = Literal["cross_entropy", "accuracy"]

_SHARED = ("backbone", "head", "method", "images", "root", "val_share", "reserve", "n", "seed")
_LEAST = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        suite: name of a suite, or a folder with the user's own tasks.
        backbone: `resnet` or `vit` (shipped), or any other base.
        tasks: names of tasks to be merged in the end; null for all of the suite.
        budget: seconds (of one processor; of the wall with a GPU) for everything: the probes, the
            validation run, and the training of all experts as recommended.
        budget_steps: the budget in steps of 32 samples in place of seconds: the same answer on
            every machine.
        method: how experts will be merged.
        sample: tasks that probes and validation run take at most; a small budget makes them fewer.
        ways: ways to train that enter the validation run, at least 1.
        probe_share: share of the budget for the probes.
        confirm_share: share of the budget for ways that the validation run gives up; the rest
            trains the experts, some of them in the validation run already.
        aim: what the validation run chooses by: `cross_entropy`, which few images tell better, or
            `accuracy`.
        head: how heads are made: `frozen-ncm`, `frozen-probe`, `embeddings:FILE` or `trained`.
        images: largest number of training images of a task that BatchNorm statistics and training
            losses of merges are taken on.
        root: folder of the downloaded data sets; null for the default one.
        val_share: share of the training images carved out for validation.
        reserve: training images carved out that no run trains on.
        n: training images of a task, of which `space.share` takes shares; null for all.
        seed: of the split, the order of images and all draws.
    """

    suite: str
    backbone: str = "resnet"
    tasks: Sequence[str] | None = None
    budget: float | None = None
    budget_steps: int | None = None
    method: str = "average"
    sample: int = 8
    ways: int = 3
    probe_share: float = 0.05
    confirm_share: float = 0.2
    aim: Aim = "cross_entropy"
    head: str = "frozen-ncm"
    images: int = 128
    root: Path | None = None
    val_share: float = 0.1
    reserve: int = 64
    n: int | None = None
    seed: int = 0

    @property
    def limit(self) -> float:
        """The budget in its own unit."""
        return float(self.budget if self.budget_steps is None else self.budget_steps)  # type: ignore[arg-type] # one is given


def checked(request: Request, space: Space) -> Setting:
    """Return what stays the same for all candidates; refuse what can be refused before any work.

    Raises:
        KeyError: unknown suite, task or method.
        ValueError: a value out of range, or a task without validation images.
    """
    _check_numbers(request)
    if request.aim not in get_args(Aim):
        raise KeyError(unknown_name("aim", request.aim, get_args(Aim)))
    head_kind(request.head)
    _check_method(request)
    suite = load_suite(request.suite, root=request.root)
    tasks = suite.chosen(request.tasks)
    if len(tasks) < _LEAST:
        raise ValueError(f"A merge must be of at least {_LEAST} tasks, but got {list(tasks)!r}.")
    setting = Setting(
        suite=request.suite,
        tasks=tasks,
        space=space,
        **{name: getattr(request, name) for name in _SHARED},
    )
    for task in tasks:
        if not len(suite.task(task).load(setting.split(), root=request.root).val):
            raise ValueError(
                f"Every task must have validation images to confirm on, but {task!r} has none. "
                "Raise `val_share`."
            )
    return setting


def _check_numbers(request: Request) -> None:
    if (request.budget is None) == (request.budget_steps is None):
        raise ValueError("`budget` (seconds) or `budget_steps` must be given, and not both.")
    if not 0 < request.limit < math.inf:
        raise ValueError(f"`budget` must be positive and finite, but is {request.limit!r}.")
    for name, least in (("sample", 1), ("ways", 1), ("images", 2)):
        value = getattr(request, name)
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    Shares(probe=request.probe_share, confirm=request.confirm_share)


def _check_method(request: Request) -> None:
    """Refuse methods that are unknown, or look at images beside those of the statistics."""
    needs = MERGE_METHODS.get(request.method).facts.get("data")
    if needs not in ("none", "cards"):
        raise ValueError(
            f"`method` must need no images, but {request.method!r} looks at {needs!r}. Recommend "
            "for 'average' or another that needs none."
        )
