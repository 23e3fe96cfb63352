"""This file finds the measured merges that are most like a new one."""

import numpy as np

from mergekit_lit.search.predicting.rows import Numbers, Rows

COUNT = 3
"""How many are told."""


def nearest(known: Rows, new: Rows, *, count: int = COUNT) -> list[int]:
    """Return the places of the rows of merges most like those of a new one, the most alike first.

    Features are taken as their ranks among the known rows, so that no unit counts more than
    another; the distance of a row is the mean difference of ranks over the features that both know,
    and each known merge counts once, with its row that is nearest to any of the new ones.

    Args:
        known: measured rows.
        new: rows of one merge, with the same features.
        count: how many merges.
    """
    ordered = np.sort(known.features, axis=0)
    ranks, wanted = (_ranks(ordered, rows.features) for rows in (known, new))
    distances = np.min([_distance(ranks, row) for row in wanted], axis=0)
    found: list[int] = []
    merges: set[str] = set()
    for place in np.argsort(distances, kind="stable"):
        if known.merge[place] not in merges:
            merges.add(known.merge[place])
            found.append(int(place))
        if len(found) == count:
            break
    return found


def _ranks(ordered: Numbers, values: Numbers) -> Numbers:
    """Return the share of the known values below each value, (n, p); NaN stays."""
    columns = [
        np.searchsorted(ordered[:, j], values[:, j]) / max(len(ordered), 1)
        for j in range(values.shape[1])
    ]
    return np.where(np.isnan(values), np.nan, np.stack(columns, axis=1))


def _distance(ranks: Numbers, row: Numbers) -> Numbers:
    """Return the mean difference from a row over what both know; infinite where that is nothing."""
    apart = np.abs(ranks - row)
    known = np.isfinite(apart)
    sums = np.where(known, apart, 0).sum(axis=1)
    return np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.inf)
