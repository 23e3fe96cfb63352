"""This file is what is believed of merges before any of a group is scored: a Gaussian process.

The value of merge x of group g, in mean accuracy over its tasks, is

    y(g, x) = level(g) + f(x) + f_alike(g, x) + f_own(g, x) + noise,

f for all groups, f_alike for those that are alike, f_own for one, each a Gaussian process over
`places.likeness`; the level of a group's difficulty has so wide a prior that it drops out. Merges
of other groups, from a table, are observations like any other: conditioned on them, the process is
the prior of a new group. Without a table it holds that merges that are alike do alike, that neither
no step nor the longest is best, and that statistics which are not the merge's own cost accuracy.

A value far below the group's average is as bad as any: what is more than `FLOOR` below counts as
just so much below, or the depth of bad merges would hide the differences of good ones.

**Source:** Rasmussen & Williams 2006, eq. 2.22-2.24; multi-task processes as Swersky et al. 2013.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.search.predicting.columns import Row
from mergekit_lit.search.tuning.group import mean_row
from mergekit_lit.search.tuning.places import Lengths, Numbers, Places, likeness, places_of
from mergekit_lit.search.tuning.pool import Candidate

FLOOR = 0.1
"""How far below its group's reference a merge is as bad as any, in accuracy."""

NEEDED = ("backbone", "suite", "group", "merge", "method", "config", "test_accuracy")
"""Columns of a table of merges that the prior is learned from, beside those of `ALIKE`."""

ALIKE: Mapping[str, tuple[str, float]] = {
    "experts": ("log2", 1.0),
    "log_relative_norm": ("", 0.3),
    "group_cosine": ("", 0.15),
}
"""What makes groups alike: a feature, how it is taken, and the distance at which likeness falls."""

# Deviations and noise by the likelihood of three exhaustive grids and a table of 34 groups;
# lengths by the regret on these grids, of about fifteen settings. Searches are compared on others.
_LENGTHS = Lengths(length=0.3, rest=0.6, policy=0.3, across=0.6, words=0.8)
_ALL, _ALIKE, _OWN, _LEVEL, NOISE = 0.028, 0.01, 0.022, 0.3, 0.007
# What is lost by a step of no length or of the largest, and by another model's statistics: the more
# of it, the longer the step.
_ARCH, _MIDDLE, _POLICY, _POLICY_LENGTH = 0.3, 0.45, 0.03, 0.02


@dataclass(frozen=True)
class Prior:
    """What is believed of a pool.

    Attributes:
        mean: of each candidate, up to a constant, (n,).
        covariance: of all of them, (n, n).
    """

    mean: Numbers
    covariance: Numbers


@dataclass(frozen=True)
class Measured:
    """Merges of other groups.

    Attributes:
        places: where they lie, n of them.
        value: mean accuracy, less that of the average of the group, (n,).
        group: which group, (n,).
        alike: what makes groups alike, in units of its distance, (n, d).
    """

    places: Places
    value: Numbers
    group: NDArray[np.str_]
    alike: Numbers


def prior_of(
    pool: Sequence[Candidate],
    facts: Mapping[str, float],
    measured: Measured | None = None,
    *,
    statistics: bool = True,
) -> Prior:
    """Return what is believed of a pool of candidates.

    Args:
        pool: n candidates.
        facts: what is known of their group, as `facts_of_group` has it.
        measured: merges of other groups; None where there is no table.
        statistics: whether the group's model has BatchNorm statistics.
    """
    places = places_of(pool, statistics=statistics)
    like = likeness(places, places, lengths=_LENGTHS)
    covariance = like * (_ALL**2 + _ALIKE**2 + _OWN**2) + _LEVEL**2
    mean = _mean(places)
    if measured is None:
        return Prior(mean, covariance)
    near = _groups_near(alike_of(facts)[None], measured.alike)
    cross = likeness(places, measured.places, lengths=_LENGTHS) * (_ALL**2 + _ALIKE**2 * near)
    among = _among(measured)
    weights = np.linalg.solve(among, cross.T)  # (m, n)
    residual = measured.value - _mean(measured.places)
    return Prior(mean + residual @ weights, covariance - cross @ weights)


def _mean(places: Places) -> Numbers:
    """Return what is believed of merges of which nothing is known, (n,)."""
    arch = -_ARCH * (places.length - _MIDDLE) ** 2
    found: Numbers = arch - places.policy**2 * (_POLICY + _POLICY_LENGTH * places.length)
    return found


def _among(measured: Measured) -> Numbers:
    """Return the covariance of what was measured, with its noise, (m, m)."""
    same = (measured.group[:, None] == measured.group[None]).astype(np.float64)
    near = _groups_near(measured.alike, measured.alike)
    like = likeness(measured.places, measured.places, lengths=_LENGTHS)
    among = like * (_ALL**2 + _ALIKE**2 * near + _OWN**2 * same) + _LEVEL**2 * same
    found: Numbers = among + NOISE**2 * np.eye(len(same))
    return found


def alike_of(facts: Mapping[str, float]) -> Numbers:
    """Return what makes groups alike, in units of its distance, (d,); 0 for what is unknown."""
    values = [
        (math.log2(facts[name]) if how == "log2" else facts[name]) / unit
        for name, (how, unit) in ALIKE.items()
    ]
    found: Numbers = np.nan_to_num(np.array(values))
    return found


def measured_of(table: Sequence[Row]) -> Measured:
    """Return the merges of a table.

    Args:
        table: rows by column, one a merge and task, as `predicting.table.read_table` has them.

    Raises:
        ValueError: a column is missing, or no group has the average among its merges.
    """
    missing = [name for name in (*NEEDED, *ALIKE) if not table or name not in table[0]]
    if missing:
        raise ValueError(
            f"`table` must hold merges with the column {missing[0]!r}, but does not. Build one: "
            "python experiments/merges.py."
        )
    groups: dict[str, dict[int, list[Row]]] = {}
    for row in table:
        name = "/".join(str(row[key]) for key in ("backbone", "suite", "group"))
        groups.setdefault(name, {}).setdefault(row["merge"], []).append(row)
    found = [
        (name, alike_of(mean_row(first)), *merge)
        for name, merges in groups.items()
        if (first := _average(merges)) is not None
        for merge in _relative(merges, first)
    ]
    if not found:
        raise ValueError(
            "`table` must hold groups whose merges include the average, but none does. Build one: "
            "python experiments/merges.py."
        )
    names, alike, candidates, values = zip(*found, strict=True)
    return Measured(places_of(candidates), np.array(values), np.array(names), np.stack(alike))


def _average(merges: Mapping[int, Sequence[Row]]) -> Sequence[Row] | None:
    return next((rows for rows in merges.values() if rows[0]["method"] == "average"), None)


def _relative(
    merges: Mapping[int, Sequence[Row]], first: Sequence[Row]
) -> list[tuple[Candidate, float]]:
    """Return merges of a group with their accuracy, less that of the average."""
    level = _accuracy(first)
    return [
        (
            Candidate(rows[0]["method"], json.loads(rows[0]["config"]), "recalibrate-per-task"),
            max(_accuracy(rows) - level, -FLOOR),
        )
        for rows in merges.values()
        if rows[0]["method"] in MERGE_METHODS.names()
    ]


def _accuracy(rows: Sequence[Row]) -> float:
    return float(np.mean([row["test_accuracy"] for row in rows]))


def _groups_near(a: Numbers, b: Numbers) -> Numbers:
    """Return how alike groups are, (n, m)."""
    found: Numbers = np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=2))
    return found
