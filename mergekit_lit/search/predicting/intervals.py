"""This file is intervals of predictions: residuals on tasks that were held out, made as wide.

Split conformal prediction with residuals by cross-fitting: each row is predicted by what was
learned without any merge that its task has a part in, so that intervals are those of a new task.

Source: Papadopoulos et al. 2002 (normalised residuals), Barber et al. 2021, arXiv:1905.02928
(cross-fitted residuals; we take the simple cross-conformal form, without its guarantee of
1 - 2 alpha).
"""

import math
from dataclasses import dataclass

import numpy as np

from mergekit_lit.search.predicting.folds import leave_one_task_out
from mergekit_lit.search.predicting.predictors import Fit, Predict
from mergekit_lit.search.predicting.rows import Numbers, Rows, Words, mean_by

LEVEL = 0.9
_TASKS = 8
"""Tasks that residuals are looked at of: each costs a fit."""
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Predicted:
    """A prediction with its interval, entry by entry.

    Attributes:
        labels: what is predicted: tasks of a merge, or merges.
        value: the prediction.
        low: lower end.
        high: upper end.
    """

    labels: Words
    value: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True)
class Calibrated:
    """A predictor with the widths of its intervals.

    Attributes:
        predict: the predictor, fitted to all rows.
        row_width: half-width of a row's interval.
        merge_width: of the interval of a merge's mean over its tasks.
    """

    predict: Predict
    row_width: float
    merge_width: float

    def rows(self, new: Rows) -> Predicted:
        """Return what each task of each merge will have."""
        return _within(new.task, self.predict(new), self.row_width, new.ends)

    def merges(self, new: Rows) -> Predicted:
        """Return what each merge will have on average over its tasks, in the order of names."""
        names, values = mean_by(new.merge, self.predict(new))
        return _within(names, values, self.merge_width, new.ends)


def calibrated(fit: Fit, rows: Rows, *, level: float = LEVEL) -> Calibrated:
    """Fit a predictor, and find how wide its intervals must be for tasks that it has not seen.

    Args:
        fit: the predictor.
        rows: to learn from; of at least two tasks that share no merge with one another somewhere.
        level: share of outcomes that an interval is to hold, in (0, 1).
    """
    truth, found, merges = held_out(fit, rows)
    by_merge = (mean_by(merges, values)[1] for values in (truth, found))
    return Calibrated(
        fit(rows), _width(truth - found, level), _width(np.subtract(*by_merge), level)
    )


def held_out(fit: Fit, rows: Rows) -> tuple[Numbers, Numbers, Words]:
    """Return outcomes, predictions without the row's task, and merges of the rows of some tasks."""
    folds = [fold for fold in leave_one_task_out(rows) if len(fold.train)]
    folds = [folds[i] for i in np.linspace(0, len(folds) - 1, min(_TASKS, len(folds))).astype(int)]
    if not folds:
        raise ValueError(
            "Intervals must be found on merges that a task has no part in, but every task has a "
            "part in every merge. Give more groups of experts."
        )
    found = [fit(fold.train)(fold.test) for fold in folds]
    return (
        np.concatenate([fold.test.outcome for fold in folds]),
        np.concatenate(found),
        np.concatenate([fold.test.merge for fold in folds]),
    )


def _width(residuals: Numbers, level: float) -> float:
    """Return the ceil((n + 1) level)-th smallest distance, the largest where n is too small."""
    distances = np.sort(np.abs(residuals))
    place = min(math.ceil((len(distances) + 1) * level), len(distances))
    return max(float(distances[place - 1]), _LEAST_SPREAD)


def _within(labels: Words, values: Numbers, width: float, ends: tuple[float, float]) -> Predicted:
    low, high = (np.clip(values + side * width, *ends) for side in (-1, 1))
    return Predicted(labels, values, low, high)
