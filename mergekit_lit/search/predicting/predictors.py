"""This file is predictors of a merge's accuracy: trees, a linear model, and what they must beat.

Each learns the step from an anchor, the expert's own accuracy where that is known, so that a task
that was never seen is not drawn to the mean of those that were.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mergekit_lit.search.predicting.rows import Numbers, Rows

Predict: TypeAlias = Callable[[Rows], Numbers]
"""Returns a prediction for each row, (n,); where nothing is fitted, of an order alone."""

Fit: TypeAlias = Callable[[Rows], Predict]
"""Learns from rows."""

ANCHOR = "expert_val_accuracy"
_LEARNING_RATE, _LEAVES, _LEAF_ROWS = 0.05, 15, 20
_RIDGES = tuple(float(10.0**k) for k in range(-2, 5))


@dataclass(frozen=True)
class Boosting:
    """Boosted trees that fall, or rise, in the features of which theory says so.

    Attributes:
        directions: -1 for features in which the accuracy must not rise, 1 for those in which it
            must not fall.
        seed: of what is drawn at random.
        trees: how many of them.
    """

    directions: Mapping[str, int]
    seed: int = 0
    trees: int = 250

    def __call__(self, rows: Rows) -> Predict:
        """Learn from rows."""
        model = self._model(rows.names)
        model.fit(rows.features, rows.accuracy - anchors(rows))
        return lambda new: np.clip(anchors(new) + model.predict(new.features), 0, 1)

    def _model(self, names: Sequence[str]) -> Any:
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            learning_rate=_LEARNING_RATE,
            max_iter=self.trees,
            max_leaf_nodes=_LEAVES,
            min_samples_leaf=_LEAF_ROWS,
            monotonic_cst=[self.directions.get(name, 0) for name in names],
            early_stopping=False,
            random_state=self.seed,
        )


def linear(rows: Rows) -> Predict:
    """Learn a ridge regression on ranks of the features, its penalty chosen by leave-one-out."""
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import QuantileTransformer

    steps = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        QuantileTransformer(
            n_quantiles=min(100, len(rows)), output_distribution="normal", random_state=0
        ),
        RidgeCV(_RIDGES),
    )
    steps.fit(rows.features, rows.accuracy - anchors(rows))
    return lambda new: np.clip(anchors(new) + steps.predict(new.features), 0, 1)


def alone(name: str, sign: int = 1) -> Fit:
    """Return the predictor that takes one feature as it is; unknown values count as their mean."""

    def fit(rows: Rows) -> Predict:
        fill = _mean(rows.column(name))
        return lambda new: sign * np.nan_to_num(new.column(name), nan=fill)

    return fit


def constant(rows: Rows) -> Predict:
    """Predict the mean of everything seen."""
    mean = float(rows.accuracy.mean())
    return lambda new: np.full(len(new), mean)


def task_mean(rows: Rows) -> Predict:
    """Predict the mean of the task; of a task that was not seen, that of everything."""
    whole = float(rows.accuracy.mean())
    means = {task: float(rows.accuracy[rows.task == task].mean()) for task in np.unique(rows.task)}
    return lambda new: np.array([means.get(task, whole) for task in new.task])


def anchors(rows: Rows) -> Numbers:
    """Return what each prediction starts from: the expert's accuracy, or 0 where it is not told."""
    if ANCHOR not in rows.names:
        return np.zeros(len(rows))
    return np.nan_to_num(rows.column(ANCHOR), nan=0.0)


def _mean(values: Numbers) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0
