"""This file is predictors of merges: trees, a linear model, and what they must beat.

Those that are fitted learn the change from the rows' start, such as the base's accuracy on the very
images that the merge is judged on, and tell it from what is known of that start beforehand: how a
task's test images differ from its others is then not taken for what merging does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_lit.search.predicting.rows import Numbers, Rows, Words

Predict: TypeAlias = Callable[[Rows], Numbers]
"""Returns a prediction for each row, (n,); where nothing is fitted, of an order alone."""

Fit: TypeAlias = Callable[[Rows], Predict]
"""Learns from rows."""

_LEARNING_RATE, _LEAVES, _LEAF_ROWS, _BINS = 0.08, 15, 20, 64
_METHOD = "method"
_RIDGES = tuple(float(10.0**k) for k in range(-2, 5))


@dataclass(frozen=True)
class Boosting:
    """Boosted trees that fall, or rise, in the features of which theory says so.

    Attributes:
        directions: -1 for features in which the outcome must not rise, 1 for those in which it
            must not fall.
        seed: of what is drawn at random.
        trees: how many of them.
    """

    directions: Mapping[str, int]
    seed: int = 0
    trees: int = 80

    def __call__(self, rows: Rows) -> Predict:
        """Learn from rows."""
        # What none of them knows cannot be split at.
        known = np.flatnonzero(np.isfinite(rows.features).any(axis=0))
        methods = np.unique(rows.method)
        model = self._model([*(rows.names[place] for place in known), _METHOD])
        model.fit(_with_method(rows, known, methods), rows.change)
        return lambda new: new.reached(model.predict(_with_method(new, known, methods)))

    def _model(self, names: Sequence[str]) -> Any:
        return _trees()(
            learning_rate=_LEARNING_RATE,
            max_iter=self.trees,
            max_leaf_nodes=_LEAVES,
            min_samples_leaf=_LEAF_ROWS,
            max_bins=_BINS,
            monotonic_cst=[self.directions.get(name, 0) for name in names],
            categorical_features=[name == _METHOD for name in names],
            early_stopping=False,
            random_state=self.seed,
        )


def check_trees() -> None:
    """Refuse to go on where boosted trees cannot be fitted, before any work is lost.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    _trees()


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
    steps.fit(rows.features, rows.change)
    return lambda new: new.reached(steps.predict(new.features))


def alone(*names: str, sign: int = 1) -> Fit:
    """Return the predictor that takes a feature as it is, or the sum of several.

    Unknown values count as their mean.
    """

    def fit(rows: Rows) -> Predict:
        fill = {name: _mean(rows.column(name)) for name in names}

        def predict(new: Rows) -> Numbers:
            known = [np.nan_to_num(new.column(name), nan=fill[name]) for name in names]
            total: Numbers = np.stack(known).sum(axis=0)
            return sign * total

        return predict

    return fit


def constant(rows: Rows) -> Predict:
    """Predict the mean of everything seen."""
    mean = float(rows.outcome.mean())
    return lambda new: np.full(len(new), mean)


def task_mean(rows: Rows) -> Predict:
    """Predict the mean of the task; of a task that was not seen, that of everything."""
    whole = float(rows.outcome.mean())
    means = {task: float(rows.outcome[rows.task == task].mean()) for task in np.unique(rows.task)}
    return lambda new: np.array([means.get(task, whole) for task in new.task])


def always(method: str) -> Fit:
    """Return the predictor that expects most of one method, and the same of all others."""
    return lambda _: lambda new: (new.method == method).astype(np.float64)


def method_mean(rows: Rows) -> Predict:
    """Predict the mean change that a method makes; of an unknown one, that of all."""
    change = rows.outcome - rows.start
    whole = float(change.mean())
    means = {name: float(change[rows.method == name].mean()) for name in np.unique(rows.method)}
    return lambda new: new.anchor + np.array([means.get(name, whole) for name in new.method])


def _trees() -> Any:
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'Learning from tables of merges needs scikit-learn: pip install -e ".[predict]".'
        ) from None
    return HistGradientBoostingRegressor


def _with_method(rows: Rows, known: NDArray[np.intp], methods: Words) -> Numbers:
    """Return features and the place of the method, which is unknown where it was not seen."""
    place = np.searchsorted(methods, rows.method) % len(methods)
    method = np.where(methods[place] == rows.method, place, np.nan)
    return np.column_stack([rows.features[:, known], method])


def _mean(values: Numbers) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0
