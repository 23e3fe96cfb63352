"""This file is exponents of one factor at a time.

It is a module of `experiments/hyperparameters_report.py`, which says what is measured how.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from claims import CLOSED, Prediction
from closed_form import eps_at_constant_noise, merged_noise_at_constant_noise

from mergekit_lit.reports.intervals import student_half_width

Row: TypeAlias = Mapping[str, Any]
DRAWS = 1000
LEAST_GROUPS = 5
"""The fewest groups whose bootstrap makes an interval: fewer have too few resamples that differ."""

SIGNED = {
    *("gap", "merged gradient", "test loss beyond the base's"),
    *("train loss over experts", "test loss over experts"),
}
"""Quantities that may be negative."""

ACROSS: Mapping[str, Callable[[Row], float]] = {
    "learning rate": lambda row: row["lr"],
    "batch": lambda row: row["batch"],
    "effective steps": lambda row: row["travel"] / row["lr"],
    "training images": lambda row: row["n"],
    "tasks": lambda row: row["size"],
}
QUANTITIES: Mapping[str, Callable[[Row], float]] = {
    "train loss": lambda row: row["train_loss"],
    "test loss": lambda row: row["test_loss"],
    "test loss beyond the base's": lambda row: row["test_loss"] - row["base_test_loss"],
    "gap": lambda row: row["gap"] - row["base_gap"],
    "eps_path": lambda row: row["eps_path"],
    "displacement": lambda row: row["displacement"],
    "drift": lambda row: row["drift"],
    "merged noise": lambda row: row["merged_noise"],
    "generalization_path": lambda row: row["generalization_path"],
    "train loss over experts": lambda row: row["train_loss"] - row["experts_train_loss"],
    "test loss over experts": lambda row: row["test_loss"] - row["experts_test_loss"],
    "merged gradient": lambda row: row["merged_gradient"],
}
# At a constant G the generalization term is as eps.
CLOSED_FORMS: Mapping[str, Callable[[Row], float]] = {
    "eps_path": eps_at_constant_noise,
    "generalization_path": eps_at_constant_noise,
    "merged noise": merged_noise_at_constant_noise,
}
# What stays at the centre while a factor varies.
HELD = {
    "learning rate": ("batch", "train_share"),
    "batch": ("lr", "train_share"),
    "effective steps": ("lr", "batch", "train_share"),
    "training images": ("lr", "batch"),
    "tasks": ("lr", "batch", "train_share"),
}


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by what they share, in the order in which it first comes."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def varying(rows: Sequence[Row], factor: str) -> list[Row]:
    """Return the rows where only one factor is off the centre, of the groups that it is seen in."""
    middle = centre(rows)
    size = usual_size(rows)
    return [
        row
        for row in rows
        if all(row[name] == middle[name] for name in HELD[factor])
        and (factor == "tasks" or row["size"] == size)
    ]


def centre(rows: Sequence[Row]) -> dict[str, float]:
    """Return the configuration that the others differ from in one factor: what most have."""
    found = grouped(rows, "lr", "batch", "train_share")
    names = ("lr", "batch", "train_share")
    return {name: statistics.mode(key[i] for key in found) for i, name in enumerate(names)}


def usual_size(rows: Sequence[Row]) -> float:
    """Return the number of tasks of the groups that all configurations have."""
    return statistics.mode(row["size"] for row in rows)


def epochs(row: Row) -> float:
    """Return how often the expert has seen each image."""
    return float(row["steps"] * row["batch"] / row["n"])


def measured(
    rows: Sequence[Row], factor: str, quantity: str
) -> tuple[float, tuple[float, float] | None] | None:
    """Return the slope with its interval; None where the factor does not vary.

    Of a single seed there is an interval from `LEAST_GROUPS` groups on.
    """
    kept = _kept(rows, factor, quantity)
    seeds = grouped(kept, "seed").values()
    groups = {row["group"] for row in kept}
    draws = DRAWS if len(seeds) == 1 and len(groups) >= LEAST_GROUPS else 0
    by_seed = [_slopes(each, factor, _values(each, quantity), draws=draws) for each in seeds]
    by_seed = [slopes for slopes in by_seed if np.isfinite(slopes[0])]
    if not by_seed:
        return None
    first = [slopes[0] for slopes in by_seed]
    mean = statistics.fmean(first)
    if len(seeds) > 1 and len(first) > 1:
        half = student_half_width(first)
        return mean, (mean - half, mean + half)
    # The merged gradient is measured once for all groups.
    if quantity == "merged gradient" or not draws:
        return mean, None
    low, high = np.nanquantile(by_seed[0][1:], [0.025, 0.975])
    return mean, (float(low), float(high))


def predicted_of(
    prediction: Prediction, rows: Sequence[Row], factor: str, quantity: str
) -> Prediction:
    """Return a prediction, the closed form as the exponent that it has over the rows."""
    if prediction != CLOSED:
        return prediction
    of = CLOSED_FORMS[quantity]
    slopes = [
        _slopes(each, factor, np.log([of(row) for row in each]), draws=0)[0]
        for each in grouped(_kept(rows, factor, quantity), "seed").values()
    ]
    return statistics.fmean(slope for slope in slopes if np.isfinite(slope))


def _kept(rows: Sequence[Row], factor: str, quantity: str) -> list[Row]:
    # What a row does not know is NaN, which is above nothing.
    known = [row for row in rows if ACROSS[factor](row) > 0]
    return [row for row in known if quantity in SIGNED or QUANTITIES[quantity](row) > 0]


def _values(rows: Sequence[Row], quantity: str) -> Any:
    found = np.array([QUANTITIES[quantity](row) for row in rows])
    return found if quantity in SIGNED else np.log(found)


def _slopes(rows: Sequence[Row], factor: str, y: Any, *, draws: int) -> list[float]:
    """Return the slope of y over the log of a factor, of all groups and of `draws` resamples.

    Least squares with a level of its own for each group and number of steps; groups of one size are
    resampled together. Of the number of steps itself, a level for each group; of the number of
    tasks, one for each number of steps.
    """
    x = np.log([ACROSS[factor](row) for row in rows])
    groups = sorted({(row["size"], row["group"]) for row in rows})
    of_row = np.array([groups.index((row["size"], row["group"])) for row in rows])
    levels = {"effective steps": ("group",), "tasks": ("steps",)}.get(factor, ("steps", "group"))
    keys = sorted({tuple(row[name] for name in levels) for row in rows})
    level = np.array([keys.index(tuple(row[name] for name in levels)) for row in rows])
    generator = np.random.default_rng(0)
    found = []
    for draw in range(draws + 1):
        counts = np.ones(len(groups)) if draw == 0 else _resampled(groups, generator)
        found.append(_slope(x, y, level, counts[of_row]))
    return found


def _resampled(groups: Sequence[tuple[float, str]], generator: np.random.Generator) -> Any:
    counts: list[float] = []
    for _, each in groupby(groups, key=lambda group: group[0]):
        size = len(list(each))
        counts += list(generator.multinomial(size, np.full(size, 1 / size)))
    return np.array(counts, dtype=float)


def _slope(x: Any, y: Any, level: Any, weights: Any) -> float:
    """Return the weighted least-squares slope within levels; NaN where x does not vary."""
    total = np.bincount(level, weights)
    total[total == 0] = 1.0
    across = x - (np.bincount(level, weights * x) / total)[level]
    up = y - (np.bincount(level, weights * y) / total)[level]
    spread = float((weights * across**2).sum())
    return float((weights * across * up).sum()) / spread if spread > 1e-9 else float("nan")
