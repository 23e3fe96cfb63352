"""This file is what is held out when a predictor is judged: tasks, groups, a backbone, real tasks.

Folds follow from the labels alone, before anything is fitted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from mergekit_lit.search.predicting.rows import Rows, Words

SAME_IMAGES: Mapping[str, str] = MappingProxyType({"fashionmnist": "fashion"})
"""Tasks of the same images as another: one is never learned from where the other is judged."""


@dataclass(frozen=True)
class Fold:
    """One part that is held out.

    Attributes:
        name: what is held out.
        train: rows to learn from.
        test: rows to be judged on.
    """

    name: str
    train: Rows
    test: Rows


Split: TypeAlias = Callable[[Rows], Iterator[Fold]]
"""Makes the folds of rows."""


def leave_one_task_out(rows: Rows) -> Iterator[Fold]:
    """Yield a fold for each task, whose rows are judged.

    Learned from is no merge that the task has a part in: its other rows tell of the same step.
    """
    tasks = np.array([SAME_IMAGES.get(task, task) for task in rows.task])
    for task in np.unique(tasks):
        held = tasks == task
        part = np.isin(rows.merge, rows.merge[held])
        yield Fold(str(task), rows.at(~part), rows.at(held))


def leave_groups_out(rows: Rows) -> Iterator[Fold]:
    """Yield ten folds, in each of which a tenth of the groups of experts is held out."""
    yield from _by_label(rows, rows.group, 10)


def leave_one_backbone_out(rows: Rows) -> Iterator[Fold]:
    """Yield a fold for each backbone."""
    yield from _by_label(rows, rows.backbone, None)


def embedded_to_real(rows: Rows) -> Iterator[Fold]:
    """Yield the one fold that learns from the shipped tasks and is judged on the real ones."""
    if rows.real.any() and not rows.real.all():
        yield Fold("real", rows.at(~rows.real), rows.at(rows.real))


SPLITS: Mapping[str, Split] = {
    "leave one task out": leave_one_task_out,
    "leave groups out": leave_groups_out,
    "leave one backbone out": leave_one_backbone_out,
    "embedded to real": embedded_to_real,
}


def _by_label(rows: Rows, labels: Words, count: int | None) -> Iterator[Fold]:
    """Yield folds of whole labels: one each, or `count` of about equally many in their order."""
    distinct = np.unique(labels)
    parts = np.array_split(distinct, min(count or len(distinct), len(distinct)))
    if len(parts) < 2:
        return
    for part in parts:
        held = np.isin(labels, part)
        name = str(part[0]) if len(part) == 1 else f"{part[0]} ... {part[-1]}"
        yield Fold(name, rows.at(~held), rows.at(held))
