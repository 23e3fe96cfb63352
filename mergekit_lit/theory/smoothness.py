"""This file measures how curved the loss is around a merge, and G^2, on fixed images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, drawn
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params, flat
from mergekit_lit.theory.curvature import (
    Eigenvalue,
    random_direction,
    rayleigh,
    secant_smoothness,
    top_eigenvalue,
)
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.heterogeneity import Estimate, per_sample_square
from mergekit_lit.theory.objective import Objective, hessian_product


@dataclass(frozen=True)
class Smoothness:
    """How curved F_S is.

    Attributes:
        secant: 95th percentile of ||grad F_S(x) - grad F_S(y)|| / ||x - y|| over base, merge,
            experts and the points halfway to them: the L that the bound takes.
        eigenvalue: the dominant eigenvalue of the Hessian at the merge.
        along: tau_i^T H tau_i / ||tau_i||^2 at the merge, by task; None where tau_i is 0.
    """

    secant: float
    eigenvalue: Eigenvalue
    along: Mapping[str, float | None]


def measure_smoothness(
    objectives: Sequence[Objective],
    base: Params,
    merged: Params,
    experts: Experts,
    calibration: Calibration,
    *,
    effort: Effort,
) -> Smoothness:
    """Return the smoothness of F_S, under the statistics of the merge, at and around it.

    Args:
        objectives: of T tasks.
        base: x0, what moves of it.
        merged: x_avg, by the same names.
        experts: where the trajectories end.
        calibration: training images of each task.
        effort: how much is looked at.
    """
    batches = _fixed_batches(objectives, calibration, effort)
    product = hessian_product(objectives, batches, merged)
    start = random_direction(flat(merged), effort.seed)
    origin = flat(base)
    ends = _ends(experts, base)
    moved = {name: flat(end) - origin for name, end in zip(experts.names, ends, strict=True)}
    return Smoothness(
        secant=_secant(objectives, base, merged, ends, batches),
        eigenvalue=top_eigenvalue(product, start, steps=effort.lanczos_steps),
        along={
            name: rayleigh(product, delta) if bool(delta.any()) else None
            for name, delta in moved.items()
        },
    )


def measure_secant(
    objectives: Sequence[Objective],
    base: Params,
    merged: Params,
    experts: Experts,
    calibration: Calibration,
    *,
    effort: Effort,
) -> float:
    """Return the 95th percentile of the secants of F_S around a merge; 0 where nothing moved.

    The points are the base, the merge, the experts, and halfway to each. The arguments are those of
    `measure_smoothness`.
    """
    batches = _fixed_batches(objectives, calibration, effort)
    return _secant(objectives, base, merged, _ends(experts, base), batches)


def _secant(
    objectives: Sequence[Objective],
    base: Params,
    merged: Params,
    ends: Sequence[Params],
    batches: Mapping[str, Batch],
) -> float:
    halfway = [{name: (base[name] + end[name]) / 2 for name in base} for end in ends]
    points = [base, merged, *ends, *halfway]
    if all(bool((point[name] == base[name]).all()) for point in points for name in base):
        return 0.0
    gradients = [
        torch.stack([o.gradient(point, batches[o.task]) for o in objectives]).mean(0)
        for point in points
    ]
    return secant_smoothness([flat(point) for point in points], gradients)


def _ends(experts: Experts, base: Params) -> list[dict[str, Tensor]]:
    return [{name: params[name].to(base[name]) for name in base} for params in experts.tuned]


def measure_sample_gradients(
    objectives: Sequence[Objective],
    weights: Params,
    calibration: Calibration,
    *,
    p: Sequence[float],
    effort: Effort,
) -> Estimate:
    """Return G^2 = sum_i p_i (1/n_i) sum_j ||grad f_i(x; z_ij)||^2 with its interval."""
    batches = _fixed_batches(objectives, calibration, effort)
    each = [o.squared_gradients(weights, batches[o.task]) for o in objectives]
    found = [per_sample_square(squares) for squares in each]
    value = sum(share * one.value for share, one in zip(p, found, strict=True))
    samples = sum(one.samples for one in found)
    if any(one.low is None for one in found):
        return Estimate(value, None, None, samples)
    # Tasks are independent: their half widths add up in squares.
    widths = [share * (one.value - (one.low or 0.0)) for share, one in zip(p, found, strict=True)]
    half = sum(width**2 for width in widths) ** 0.5
    return Estimate(value, value - half, value + half, samples)


def _fixed_batches(
    objectives: Sequence[Objective], calibration: Calibration, effort: Effort
) -> dict[str, Batch]:
    found = {}
    for objective in objectives:
        samples = calibration.samples[objective.task]
        chosen = drawn(
            samples, effort.hessian_images, "curvature", objective.task, seed=effort.seed
        )
        found[objective.task] = samples.take(chosen)
    return found
