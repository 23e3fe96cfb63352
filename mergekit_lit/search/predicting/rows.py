"""This file is what predictors learn from: one row a task of a merge."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]
Words: TypeAlias = NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features and outcomes of n rows, each a task of a merge.

    Attributes:
        names: of the features, p of them.
        features: what is known before the merge is scored, (n, p); NaN for unknown.
        outcome: what is to be predicted, (n,); NaN for unknown.
        start: what the outcome is told from, (n,): 0, or a measured outcome, such as the base's
            accuracy on the same images; NaN for unknown.
        anchor: what is known of `start` beforehand, (n,): predictions are told from it.
        unit: change of the outcome up to which differences count in full.
        ends: least and largest value that an outcome can have.
        task: name of the task, (n,).
        merge: name of the merge, whose tasks are averaged over, (n,).
        method: its method, (n,).
        group: name of the group of experts, of which there are several merges, (n,).
        backbone: name of the backbone, (n,).
        real: whether the images are of the real tasks, (n,).
    """

    names: tuple[str, ...]
    features: Numbers
    outcome: Numbers
    start: Numbers
    anchor: Numbers
    unit: float
    ends: tuple[float, float]
    task: Words
    merge: Words
    method: Words
    group: Words
    backbone: Words
    real: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.task)

    def at(self, places: NDArray[np.bool_] | NDArray[np.intp]) -> "Rows":
        """Return some of the rows."""
        return replace(
            self,
            **{
                field.name: getattr(self, field.name)[places]
                for field in fields(self)
                if field.name not in ("names", "unit", "ends")
            },
        )

    @property
    def change(self) -> Numbers:
        """What is learned, asinh((outcome - start) / unit): as log where much is lost, (n,)."""
        found: Numbers = np.arcsinh((self.outcome - self.start) / self.unit)
        return found

    def reached(self, change: Numbers) -> Numbers:
        """Return the outcomes that changes lead to from the anchors, (n,)."""
        return np.clip(self.anchor + self.unit * np.sinh(change), *self.ends)

    def column(self, name: str) -> Numbers:
        """Return one feature, (n,).

        Raises:
            KeyError: no such feature.
        """
        if name not in self.names:
            raise KeyError(f"No feature named {name!r}.")
        column: Numbers = self.features[:, self.names.index(name)]
        return column

    def with_features(self, names: Sequence[str]) -> "Rows":
        """Return the rows with some of the features."""
        places = [self.names.index(name) for name in names]
        return replace(self, names=tuple(names), features=self.features[:, places])


def mean_by(labels: Words, values: Numbers) -> tuple[Words, Numbers]:
    """Return each distinct label, sorted, and the mean of its values."""
    distinct, places = np.unique(labels, return_inverse=True)
    sums = np.bincount(places, weights=values, minlength=len(distinct))
    return distinct, sums / np.bincount(places, minlength=len(distinct))
