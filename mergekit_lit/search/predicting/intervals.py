"""This file is intervals of predictions: residuals on tasks that were held out, made as wide.

Split conformal prediction with residuals by cross-fitting: each row is predicted by what was
learned without any merge that its task has a part in, so that intervals are those of a new task.
They are the wider, the more a merge is expected to change: what breaks a model breaks it by far
less certain amounts.

Source: Papadopoulos et al. 2002 (normalised residuals), Barber et al. 2021, arXiv:1905.02928
(cross-fitted residuals; we take the simple cross-conformal form, without its guarantee of
1 - 2 alpha).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_lit.search.predicting.folds import Fold, leave_one_task_out
from mergekit_lit.search.predicting.predictors import Fit, Predict
from mergekit_lit.search.predicting.rows import Numbers, Rows, Words, mean_by

LEVEL = 0.9
_TASKS = 8
"""Tasks that residuals are looked at of: each costs a fit."""
_SPREAD = 2.5
"""Half-width, before it is calibrated, where nothing is expected to change: in units of change."""
_LEAST = 0.2
_NUMBERS = ("truth", "found", "spread")


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
        row_width: half-width of a row's interval, over what it is before it is calibrated.
        merge_width: of the interval of a merge's mean over its tasks, likewise.
    """

    predict: Predict
    row_width: float
    merge_width: float

    def rows(self, new: Rows) -> Predicted:
        """Return what each task of each merge will have."""
        values = self.predict(new)
        return _within(new.task, values, self.row_width * _spread(new, values), new.ends)

    def merges(self, new: Rows) -> Predicted:
        """Return what each merge will have on average over its tasks, in the order of names."""
        return merges_of([(self, new)])


@dataclass(frozen=True)
class HeldOut:
    """Predictions of rows whose tasks were not learned from, entry by entry.

    Attributes:
        truth: outcomes.
        found: predictions.
        spread: half-widths before they are calibrated.
        merge: names of the merges.
    """

    truth: Numbers
    found: Numbers
    spread: Numbers
    merge: Words


def merges_of(parts: Sequence[tuple[Calibrated, Rows]]) -> Predicted:
    """Return what merges will have on average over their tasks, in the order of names.

    Where several predictors tell of tasks of one merge, its interval is by the largest width of
    theirs: the mean is no surer than what is known least of.

    Args:
        parts: predictors, each with the rows that it tells of.
    """
    values = [model.predict(new) for model, new in parts]
    spreads = [_spread(new, found) for (_, new), found in zip(parts, values, strict=True)]
    merge = np.concatenate([new.merge for _, new in parts])
    names, means = mean_by(merge, np.concatenate(values))
    width = max(model.merge_width for model, _ in parts)
    halves = width * mean_by(merge, np.concatenate(spreads))[1]
    return _within(names, means, halves, parts[0][1].ends)


def calibrated(
    fit: Fit,
    rows: Rows,
    *,
    level: float = LEVEL,
    held: Sequence[HeldOut] = (),
    at_least: Sequence[HeldOut] = (),
) -> Calibrated:
    """Fit a predictor, and find how wide its intervals must be for tasks that it has not seen.

    Args:
        fit: the predictor.
        rows: to learn from; of at least two tasks that share no merge with one another somewhere.
        level: share of outcomes that an interval is to hold, in (0, 1).
        held: what `held_out` tells of these rows, where that is there already.
        at_least: what a predictor that knows more tells of held out rows: intervals are not
            narrower than its own, in the mean over these; empty for no such bound.
    """
    return Calibrated(fit(rows), *_widths(held or held_out(fit, rows), level, at_least))


def cross_calibrated(fit: Fit, folds: Sequence[Fold], *, level: float = LEVEL) -> list[Calibrated]:
    """Fit a predictor to each fold, with intervals as wide as the errors on all other folds.

    It costs a fit a fold. The folds must be of a kind with what the intervals are for; what was
    learned for the others has seen most of a fold, but its outcomes move no quantile of thousands.

    Args:
        fit: the predictor.
        folds: two or more.
        level: share of outcomes that an interval is to hold, in (0, 1).
    """
    models = [fit(fold.train) for fold in folds]
    held = [_held(fold.test, model(fold.test)) for fold, model in zip(folds, models, strict=True)]
    return [
        Calibrated(model, *_widths([*held[:i], *held[i + 1 :]], level))
        for i, model in enumerate(models)
    ]


def held_out(fit: Fit, rows: Rows) -> list[HeldOut]:
    """Return what is predicted of the rows of some tasks without any merge of the task."""
    folds = [fold for fold in leave_one_task_out(rows) if len(fold.train)]
    folds = [folds[i] for i in np.linspace(0, len(folds) - 1, min(_TASKS, len(folds))).astype(int)]
    if not folds:
        raise ValueError(
            "Intervals must be found on merges that a task has no part in, but every task has a "
            "part in every merge. Give more groups of experts."
        )
    return [_held(fold.test, fit(fold.train)(fold.test)) for fold in folds]


def _held(rows: Rows, found: Numbers) -> HeldOut:
    return HeldOut(rows.outcome, found, _spread(rows, found), rows.merge)


def _widths(
    held: Sequence[HeldOut], level: float, at_least: Sequence[HeldOut] = ()
) -> tuple[float, float]:
    """Return the widths of rows and of merges."""
    of_rows, of_merges = (_width(*numbers, level=level) for numbers in _rows_and_merges(held))
    if not at_least:
        return of_rows, of_merges
    # Widths are in units of spreads, which are of another size where the anchor is another.
    least_rows, least_merges = (
        _width(*more, level=level) * float(more[-1].mean() / less[-1].mean())
        for more, less in zip(_rows_and_merges(at_least), _rows_and_merges(held), strict=True)
    )
    return max(of_rows, least_rows), max(of_merges, least_merges)


def _rows_and_merges(held: Sequence[HeldOut]) -> tuple[list[Numbers], list[Numbers]]:
    """Return the numbers of rows, and those of merges, whose rows may lie in several parts."""
    numbers = [np.concatenate([getattr(part, n) for part in held]) for n in _NUMBERS]
    merge = np.concatenate([part.merge for part in held])
    return numbers, [mean_by(merge, values)[1] for values in numbers]


def _spread(rows: Rows, values: Numbers) -> Numbers:
    """Return the half-widths of predictions before they are calibrated."""
    found: Numbers = _SPREAD * rows.unit + np.abs(values - rows.anchor)
    return found


def _width(truth: Numbers, found: Numbers, spread: Numbers, *, level: float) -> float:
    """Return the ceil((n + 1) level)-th smallest distance, the largest where n is too small."""
    distances = np.sort(np.abs(truth - found) / spread)
    place = min(math.ceil((len(distances) + 1) * level), len(distances))
    return max(float(distances[place - 1]), _LEAST)


def _within(
    labels: Words, values: Numbers, widths: Numbers, ends: tuple[float, float]
) -> Predicted:
    low, high = (np.clip(values + side * widths, *ends) for side in (-1, 1))
    return Predicted(labels, values, low, high)
