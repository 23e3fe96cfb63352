"""This file is the barrier: what experts are expected to lose where they are averaged.

Let expert t be a minimum of its loss F_t, d_t away from its base x0 and r_t away from the average
m, and let F_t rise from it by a parabola of one curvature kappa, back to the base as well as
towards the average:

    F_t(x0) - F_t(theta_t) = kappa d_t^2 / 2   what training gained
    F_t(m)  - F_t(theta_t) = kappa r_t^2 / 2   what averaging costs

so the cost is the gain times s_t^2, with the stretch s_t = r_t / d_t. Of two experts r is half
their distance, and the cost kappa / 8 ||theta_1 - theta_2||^2. Experts of one base with unrelated
deltas of one length have s^2 = (T - 1) / T; bases that lie D apart add D^2 / 4 d^2 to that of a
pair. Where s_t > 1 the average is expected to be worse than the base, whatever the curvature.
"""

import math
from collections.abc import Sequence

from mergekit_lit.core.params import Params, norm, subtract, wide


def distances_to_mean(tuned: Sequence[Params], names: Sequence[str]) -> list[float]:
    """Return r_t = ||theta_t - (1/T) sum_s theta_s|| of each of T sets of tensors.

    Args:
        tuned: tensors of the same names and shapes.
        names: of those that count; one tensor of every set is held at a time.
    """
    squares = [0.0] * len(tuned)
    for name in names:
        rows = [wide(params[name]).double() for params in tuned]
        mean = sum(rows[1:], rows[0]) / len(rows)
        squares = [
            total + float((row - mean).square().sum())
            for total, row in zip(squares, rows, strict=True)
        ]
    return [math.sqrt(square) for square in squares]


def distance(left: Params, right: Params, names: Sequence[str]) -> float:
    """Return ||left - right|| over the tensors of some names."""
    return norm(subtract({name: left[name] for name in names}, right))


def mean_stretch(to_mean: Sequence[float], to_base: Sequence[float]) -> float:
    """Return the root of the mean of s_t^2 = (r_t / d_t)^2; infinite where an expert stands still.

    Args:
        to_mean: r_t.
        to_base: d_t, of the same experts; 0 for one that is its base.
    """
    squares = [
        (r / d) ** 2 if d else math.inf if r else 0.0 for r, d in zip(to_mean, to_base, strict=True)
    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def second_order_cost(gain: float, *, to_mean: float, to_base: float) -> float:
    """Return gain_t (r_t / d_t)^2, the loss in nats that one expert is expected to lose.

    It rests on one curvature for all directions. Training follows the steep ones, so that others
    cost less; far from the expert the loss grows slower than a parabola: both make it too high.

    Args:
        gain: F_t(x0) - F_t(theta_t), what training gained, at least 0.
        to_mean: r_t.
        to_base: d_t, above 0.

    Raises:
        ValueError: `gain` is below 0, or `to_base` is not above 0.

    Source: the second order of Taylor's theorem; our reconstruction.
    """
    if gain < 0:
        raise ValueError(f"`gain` must be at least 0, but is {gain}. The expert is no minimum.")
    if to_base <= 0:
        raise ValueError(f"`to_base` must be above 0, but is {to_base}. The expert did not move.")
    return gain * (to_mean / to_base) ** 2
