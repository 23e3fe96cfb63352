"""This file is early discard: a candidate is scored on more images for as long as it may win.

It runs against a rival whose answers to all N validation images of each task are known. On the
first n of a random order the candidate's value on all N is estimated by the paired difference,

    v = mean_N(rival) + mean_n(d),  e^2 = var_n(d) / n * (1 - n / N),  d = candidate - rival,

which errs far less than mean_n(candidate) where both are right on mostly the same images. If even
the upper end of the interval of the objective falls below the rival's own, the candidate is out.

Source: Maron & Moore 1994, Hoeffding races, with paired differences (Moore & Lee 1994) and normal
intervals for sampling without replacement (Cochran 1977, eq. 2.20 and 7.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.data.splits import Array, proportional_order
from mergekit_lit.search.tuning.objective import Answers, Objective

# Shares of the validation images after which a candidate may be out.
_SHARES = (1 / 8, 1 / 4, 1 / 2)
# Fewer differences of a task have no variance to speak of.
_FEWEST = 16

Stage: TypeAlias = Mapping[str, Tensor]
"""Positions of some images of each task, ascending, (n,); the stages hold each image once."""


@dataclass(frozen=True)
class Run:
    """How a candidate did.

    Attributes:
        answers: to the images that it saw, in the order of the stages.
        values: its value on each task; estimated where it did not see all images.
        total: the objective of those values.
        upper: upper end of the interval of the total; None where it saw all images.
    """

    answers: Answers
    values: Mapping[str, float]
    total: float
    upper: float | None = None

    @property
    def images(self) -> int:
        """How many images it saw."""
        return sum(len(each) for each in self.answers.values())


def stages_of(labels: Mapping[str, Array], *, seed: int, discard: bool) -> list[Stage]:
    """Return the images of each task in growing subsets: 1/8, 1/4, 1/2, and all of them.

    Every subset holds the classes of a task in proportion.

    Args:
        labels: labels of each task's validation images, (N,).
        seed: of the order.
        discard: whether there is to be more than one stage; else the images keep their order.
    """
    if not discard:
        return [{task: torch.arange(len(y)) for task, y in labels.items()}]
    parts = {task: _parts(proportional_order(y, seed, "tune", task)) for task, y in labels.items()}
    return [{task: part[stage] for task, part in parts.items()} for stage in range(4)]


def race(
    answer: Callable[[Stage], Answers],
    stages: Sequence[Stage],
    objective: Objective,
    *,
    rival: Run | None = None,
    confidence: float = 0.99,
) -> Run:
    """Score a candidate stage by stage, until it is through or out.

    Args:
        answer: answers the images of a stage.
        stages: as `stages_of` makes them.
        objective: what is maximised.
        rival: a run through all stages; without one nothing is discarded.
        confidence: level of the one-sided interval, in (0, 1).
    """
    seen: dict[str, Tensor] = {}
    for stage in stages:
        found = answer(stage)
        seen = {task: torch.cat([seen[task], new]) if seen else new for task, new in found.items()}
        if rival is None or stage is stages[-1]:
            continue
        values, errors = estimate(seen, rival.answers, objective)
        upper = objective.upper(values, errors, confidence)
        # Written so that a candidate whose answers are no numbers is out.
        if not upper >= rival.total:
            return Run(seen, values, objective.total(values), upper)
    values = objective.by_task(seen)
    return Run(seen, values, objective.total(values))


def estimate(
    seen: Answers, rival: Answers, objective: Objective
) -> tuple[dict[str, float], dict[str, float]]:
    """Return a candidate's value on all images of each task, and its standard error.

    Args:
        seen: the candidate's answers to the first n >= 2 images of each task.
        rival: another model's answers to all N, in the same order.
        objective: gives the unit of each task.
    """
    values, errors = {}, {}
    for task, mine in seen.items():
        theirs, unit = rival[task].double(), objective.units[task]
        n, total = len(mine), len(theirs)
        difference = mine.double() - theirs[:n]
        values[task] = float(theirs.mean() + difference.mean()) / unit
        left = 1 - n / total
        errors[task] = math.sqrt(float(difference.var()) / n * left) / unit if left else 0.0
    return values, errors


def _parts(order: Array) -> list[Tensor]:
    """Cut an order of N images where each share of them ends."""
    count = len(order)
    ends = [min(count, max(_FEWEST, round(share * count))) for share in _SHARES]
    return [torch.from_numpy(np.sort(part)) for part in np.split(order, ends)]
