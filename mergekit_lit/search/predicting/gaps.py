"""This file finds what is not known of new merges, task by task: nothing is learned from it there.

What is unknown differs from what a merge does not have, such as `density` of a plain average:
measured merges lack that alike, so that it can be learned from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.learning import learned_names

_PARAMETERS = ("scale", "density")
_BOUND = "bound_"


@dataclass(frozen=True)
class Gaps:
    """What is not known of new merges.

    Attributes:
        absent: features that none of the merges has.
        unknown: by task, features that merges of it have, but that nobody could tell.
    """

    absent: tuple[str, ...]
    unknown: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """Features that are unknown of any task, in the order of their first task."""
        return list(dict.fromkeys(name for names in self.unknown.values() for name in names))

    def parts(self) -> dict[tuple[str, ...], list[str]]:
        """Return the tasks by what is unknown of them: mostly one part."""
        found: dict[tuple[str, ...], list[str]] = {}
        for task, names in self.unknown.items():
            found.setdefault(names, []).append(task)
        return found


def gaps_of(new: Sequence[Row], level: Level) -> Gaps:
    """Return what is not known of new merges at a level.

    What is unknown of one merge of a task counts for all: merges of the same experts are compared,
    and must rest on the same facts.
    """
    names = learned_names(level)
    tasks = dict.fromkeys(row["task"] for row in new)
    return Gaps(
        absent=tuple(name for name in names if all(_absent(row, name) for row in new)),
        unknown={
            task: tuple(
                name
                for name in names
                if any(_unknown(row, name) for row in new if row["task"] == task)
            )
            for task in tasks
        },
    )


def _absent(row: Row, name: str) -> bool:
    """Return whether a merge has no such feature: no parameter, or no bound as no sum of deltas."""
    has_none = name in _PARAMETERS or (name.startswith(_BOUND) and row["linear"] == 0)
    return has_none and bool(np.isnan(row[name]))


def _unknown(row: Row, name: str) -> bool:
    return bool(np.isnan(row[name])) and not _absent(row, name)
