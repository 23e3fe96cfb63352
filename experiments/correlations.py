"""This file is the rank correlations that experiments tell; it is a module, not a command."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from exponents import grouped


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's correlation; None of fewer than three pairs, or where a side is constant.

    Values that are equal but for rounding, to nine digits or below 1e-9, are no order.
    """
    from scipy.stats import spearmanr

    x, y = ([_rounded(value) for value in side] for side in (x, y))
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def pooled_and_within(
    points: Sequence[Mapping[str, Any]], name: str, of: str
) -> tuple[float | None, float | None]:
    """Return the correlation of two numbers over all points, and its mean within the step counts.

    Args:
        points: what correlates, each with its `steps`; one that lacks a number (NaN) counts not.
        name: the number that ranks.
        of: the number that is ranked.
    """
    known = [point for point in points if not math.isnan(point[name] + point[of])]
    by_steps = [_of(each, name, of) for each in grouped(known, "steps").values()]
    within = [value for value in by_steps if value is not None]
    return _of(known, name, of), statistics.fmean(within) if within else None


def _of(points: Sequence[Mapping[str, Any]], name: str, of: str) -> float | None:
    return spearman([point[name] for point in points], [point[of] for point in points])


def _rounded(value: float) -> float:
    return float(f"{value:.9g}") if abs(value) > 1e-9 else 0.0
