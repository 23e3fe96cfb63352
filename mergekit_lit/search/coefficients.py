"""This file chooses lambda: the length of a method's step, by its score on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lit.core.registry import Registered
from mergekit_lit.merging.configuration import SCALE

# Shares of the upper end of a method's range. Good steps are short: the grid is dense near 0, far
# below where single-task vectors are scaled, and it holds 0, the base itself.
_SHARES = (0.0, 0.01, 0.03, 0.07, 0.13, 0.2, 0.3, 0.45, 0.7, 1.0)


@dataclass(frozen=True)
class Choice:
    """What a search over lambda found.

    Attributes:
        scales: the grid, ascending.
        values: the score of each on val; higher is better.
        chosen: the smallest scale with the best score.
    """

    scales: tuple[float, ...]
    values: tuple[float, ...]
    chosen: float

    @property
    def best(self) -> float:
        """The score of the chosen scale."""
        return self.values[self.scales.index(self.chosen)]


def scale_grid(method: Registered[Any]) -> tuple[float, ...]:
    """Return the scales to try for a method, ascending: none if it declares no range of `scale`.

    Points below the lower end of the declared range give way to that end.
    """
    declared = method.facts.get("search", {}).get(SCALE)
    if declared is None:
        return ()
    low, high = (float(end) for end in declared)
    points = {float(f"{share * high:.3g}") for share in _SHARES}
    return tuple(sorted({max(point, low) for point in points}))


def choose(scales: Sequence[float], score: Callable[[Sequence[float]], Sequence[float]]) -> Choice:
    """Choose the scale with the best score; of equal ones the smallest.

    Args:
        scales: candidates, in any order, at least one.
        score: returns the score on val of each scale that it is given; never sees test images.

    Raises:
        ValueError: no candidate, or not one score for each.
    """
    ordered = tuple(sorted(set(scales)))
    if not ordered:
        raise ValueError("Choosing a scale needs at least one candidate, but got none.")
    values = tuple(float(value) for value in score(ordered))
    if len(values) != len(ordered):
        raise ValueError(f"Each of {len(ordered)} scales needs one score, but got {len(values)}.")
    # A diverged merge scores NaN, which compares false with everything: it is never the best.
    best = max((value for value in values if value == value), default=None)
    if best is None:
        raise ValueError("A scale needs a score that is a number, but all are NaN.")
    return Choice(ordered, values, ordered[values.index(best)])
