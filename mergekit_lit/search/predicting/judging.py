"""This file judges predictors on what was held out: ranks, errors, intervals, regret.

What is told of new tasks or groups is uncertain by how these differ: intervals are quantiles over
draws, with replacement, of the folds; of the groups of experts where there are few folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mergekit_lit.search.predicting.folds import Fold
from mergekit_lit.search.predicting.intervals import Calibrated
from mergekit_lit.search.predicting.predictors import Fit
from mergekit_lit.search.predicting.rows import Numbers, Rows, mean_by

_DRAWS, _FEW_FOLDS, _ENDS = 200, 5, (0.05, 0.95)

Between = tuple[float, float]
"""A 90 % interval."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a predictor does on all folds.

    Attributes:
        per_fold: Spearman's rank correlation of rows within each fold.
        per_cell: the same within each task of one backbone and suite.
        pooled: Spearman's rank correlation of the rows of all folds together.
        error: mean absolute error of rows; None where predictions are of an order alone.
        regrets: by how much the merge that is predicted best falls short of the best of its group,
            in mean accuracy, one number a group of a fold.
        per_fold_within: interval of the mean of `per_fold`.
        pooled_within: interval of `pooled`.
        regret_within: interval of the mean of `regrets`.
        coverage: share of the rows within their intervals; None without intervals.
        merge_coverage: share of the merges whose mean lies within its interval; None where no more
            than one task of each is judged, or without intervals.
        width: mean width of the rows' intervals.
    """

    per_fold: Mapping[str, float]
    per_cell: Mapping[str, float]
    pooled: float
    error: float | None
    regrets: Sequence[float]
    per_fold_within: Between
    pooled_within: Between
    regret_within: Between
    coverage: float | None = None
    merge_coverage: float | None = None
    width: float | None = None


def judge(folds: Sequence[Fold], fit: Fit, *, order_alone: bool = False) -> Judgement:
    """Return how a predictor does without intervals.

    Args:
        folds: what is learned from, and judged on.
        fit: the predictor.
        order_alone: whether its predictions are of an order alone.
    """
    found = [fit(fold.train)(fold.test) for fold in folds]
    return _judged(folds, found, order_alone=order_alone)


def judge_intervals(folds: Sequence[Fold], models: Sequence[Calibrated]) -> Judgement:
    """Return how a predictor does with intervals.

    Args:
        folds: what is judged on.
        models: what was learned from each.
    """
    rows = [model.rows(fold.test) for model, fold in zip(models, folds, strict=True)]
    merges = [model.merges(fold.test) for model, fold in zip(models, folds, strict=True)]
    plain = _judged(folds, [each.value for each in rows], order_alone=False)
    truth = np.concatenate([fold.test.outcome for fold in folds])
    means = np.concatenate([mean_by(f.test.merge, f.test.outcome)[1] for f in folds])
    low, high = (np.concatenate([getattr(each, end) for each in rows]) for end in ("low", "high"))
    lows, highs = (np.concatenate([getattr(m, end) for m in merges]) for end in ("low", "high"))
    inside = (lows <= means) & (means <= highs)
    return replace(
        plain,
        coverage=float(((low <= truth) & (truth <= high)).mean()),
        merge_coverage=float(inside.mean()) if len(means) < len(truth) else None,
        width=float((high - low).mean()),
    )


def spearman(left: Numbers, right: Numbers) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def regrets(rows: Rows, predicted: Numbers) -> list[float]:
    """Return, for each group with several merges, what choosing by a prediction loses."""
    merges, truth = mean_by(rows.merge, rows.outcome)
    _, promise = mean_by(rows.merge, predicted)
    group = dict(zip(rows.merge, rows.group, strict=True))
    groups = np.array([group[merge] for merge in merges])
    found = []
    for name in np.unique(groups):
        places = np.flatnonzero(groups == name)
        if len(places) > 1:
            chosen = places[np.argmax(promise[places])]
            found.append(float(truth[places].max() - truth[chosen]))
    return found


def _judged(folds: Sequence[Fold], found: Sequence[Numbers], *, order_alone: bool) -> Judgement:
    truth, predicted = np.concatenate([fold.test.outcome for fold in folds]), np.concatenate(found)
    parts = [_cells(fold.test) for fold in folds]
    lost = [r for f, p in zip(folds, found, strict=True) for r in regrets(f.test, p)]
    per_fold, pooled = _bootstrapped(folds, truth, predicted)
    return Judgement(
        per_fold={
            fold.name: spearman(fold.test.outcome, values)
            for fold, values in zip(folds, found, strict=True)
        },
        per_cell={
            name: spearman(fold.test.outcome[places], values[places])
            for fold, values, cells in zip(folds, found, parts, strict=True)
            for name, places in cells.items()
        },
        pooled=spearman(truth, predicted),
        error=None if order_alone else float(np.abs(truth - predicted).mean()),
        regrets=lost,
        per_fold_within=per_fold,
        pooled_within=pooled,
        regret_within=_of_mean(lost),
    )


def _cells(rows: Rows) -> dict[str, NDArray[np.intp]]:
    """Return the places of each task of one backbone and suite."""
    kinds = np.where(rows.real, "real", "embedded")
    labels = np.array(
        ["/".join(each) for each in zip(rows.backbone, kinds, rows.task, strict=True)]
    )
    return {str(label): np.flatnonzero(labels == label) for label in np.unique(labels)}


def _bootstrapped(
    folds: Sequence[Fold], truth: Numbers, predicted: Numbers
) -> tuple[Between, Between]:
    """Return intervals of the mean of the folds' correlations, and of the pooled one."""
    fold = np.repeat(np.arange(len(folds)), [len(each.test) for each in folds])
    group = np.concatenate([each.test.group for each in folds])
    by_fold = len(folds) > _FEW_FOLDS
    units = fold if by_fold else np.unique(group, return_inverse=True)[1]
    places = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]
    alone = [spearman(truth[own], predicted[own]) for own in places] if by_fold else []
    draw = np.random.default_rng(0)
    means, pooled = [], []
    for _ in range(_DRAWS):
        chosen = draw.integers(len(places), size=len(places))
        rows = np.concatenate([places[i] for i in chosen])
        if by_fold:
            means.append(float(np.mean([alone[i] for i in chosen])))
        else:
            parts = [rows[fold[rows] == each] for each in range(len(folds))]
            means.append(float(np.mean([spearman(truth[p], predicted[p]) for p in parts])))
        pooled.append(spearman(truth[rows], predicted[rows]))
    return _ends(means), _ends(pooled)


def _of_mean(values: Sequence[float]) -> Between:
    """Return the interval of a mean."""
    if not values:
        return (np.nan, np.nan)
    draw = np.random.default_rng(0)
    return _ends(draw.choice(values, size=(_DRAWS, len(values))).mean(axis=1).tolist())


def _ends(values: Sequence[float]) -> Between:
    low, high = np.quantile(values, _ENDS)
    return float(low), float(high)
