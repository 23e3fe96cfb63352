"""This file judges predictors on what was held out: ranks, errors, intervals, regret."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from mergekit_lit.search.predicting.folds import Fold
from mergekit_lit.search.predicting.intervals import Calibrated
from mergekit_lit.search.predicting.predictors import Fit
from mergekit_lit.search.predicting.rows import Numbers, Rows, mean_by


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a predictor does on all folds.

    Attributes:
        per_fold: Spearman's rank correlation of rows within each fold.
        pooled: Spearman's rank correlation of the rows of all folds together.
        error: mean absolute error of rows; None where predictions are of an order alone.
        regrets: by how much the merge that is predicted best falls short of the best of its group,
            in mean accuracy, one number a group of a fold.
        coverage: share of the rows within their intervals; None without intervals.
        merge_coverage: share of the merges whose mean lies within its interval.
        width: mean width of the rows' intervals.
    """

    per_fold: Mapping[str, float]
    pooled: float
    error: float | None
    regrets: Sequence[float]
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
    return Judgement(
        **{
            **vars(plain),
            "coverage": float(((low <= truth) & (truth <= high)).mean()),
            "merge_coverage": float(
                np.mean(
                    (np.concatenate([m.low for m in merges]) <= means)
                    & (means <= np.concatenate([m.high for m in merges]))
                )
            ),
            "width": float((high - low).mean()),
        }
    )


def spearman(left: Numbers, right: Numbers) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(spearmanr(left, right).statistic)


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
    truth = [fold.test.outcome for fold in folds]
    both, all_found = np.concatenate(truth), np.concatenate(found)
    return Judgement(
        per_fold={f.name: spearman(y, p) for f, y, p in zip(folds, truth, found, strict=True)},
        pooled=spearman(both, all_found),
        error=None if order_alone else float(np.abs(both - all_found).mean()),
        regrets=[r for f, p in zip(folds, found, strict=True) for r in regrets(f.test, p)],
    )
