"""This file measures how curved the loss is around a merge, and G^2, on fixed images."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, drawn
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params, flat
from mergekit_lit.core.student import student_quantile
from mergekit_lit.theory.curvature import (
    Eigenvalue,
    random_direction,
    rayleigh,
    secant_smoothness,
    top_eigenvalue,
)
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.heterogeneity import Estimate, per_sample_square
from mergekit_lit.theory.objective import Objective, hessian_product, labels_of

# Parts of each task's images whose spread tells the intervals.
_PARTS = 4


@dataclass(frozen=True)
class Smoothness:
    """How curved F_S is.

    Attributes:
        secant: 95th percentile of ||grad F_S(x) - grad F_S(y)|| / ||x - y|| over base, merge,
            experts and the points halfway to them: the L that the bound takes.
        eigenvalue: the dominant eigenvalue of the Hessian at the merge, over these images.
        images: that they were taken over, of all tasks.
        along: tau_i^T H tau_i / ||tau_i||^2 at the merge, by task; None where tau_i is 0.
    """

    secant: Estimate
    eigenvalue: Eigenvalue
    images: int
    along: Mapping[str, Estimate | None]


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

    Intervals of secant and curvatures come from the spread over parts of the images; that of the
    secant is of the pair of points that the percentile falls on.

    Args:
        objectives: of T tasks.
        base: x0, what moves of it.
        merged: x_avg, by the same names.
        experts: where the trajectories end.
        calibration: training images of each task.
        effort: how much is looked at.
    """
    batches = _fixed_batches(objectives, calibration, effort)
    start = random_direction(flat(merged), effort.seed)
    origin = flat(base)
    points = _points(experts, base, merged)
    ends = points[2 : 2 + len(experts)]
    moved = {name: flat(end) - origin for name, end in zip(experts.names, ends, strict=True)}
    product = hessian_product(objectives, batches, merged)
    parts = _parts(batches)
    products = [hessian_product(objectives, part, merged) for part in parts]
    images = sum(len(batch.inputs) for batch in batches.values())

    def curved(delta: Tensor) -> Estimate:
        return _of_parts([rayleigh(of_part, delta) for of_part in products], parts, 2 * images)

    return Smoothness(
        secant=_secant(objectives, points, batches, parts),
        eigenvalue=top_eigenvalue(product, start, steps=effort.lanczos_steps),
        images=images,
        along={name: curved(delta) if bool(delta.any()) else None for name, delta in moved.items()},
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
    return _secant(objectives, _points(experts, base, merged), batches, []).value


def _points(experts: Experts, base: Params, merged: Params) -> list[Params]:
    ends = [{name: params[name].to(base[name]) for name in base} for params in experts.tuned]
    halfway = [{name: (base[name] + end[name]) / 2 for name in base} for end in ends]
    return [base, merged, *ends, *halfway]


def _secant(
    objectives: Sequence[Objective],
    points: Sequence[Params],
    batches: Mapping[str, Batch],
    parts: Sequence[Mapping[str, Batch]],
) -> Estimate:
    images = len(points) * sum(len(batch.inputs) for batch in batches.values())
    base = points[0]
    if all(bool((point[name] == base[name]).all()) for point in points for name in base):
        return Estimate(0.0, None, None, images)
    gradients = [_gradient(objectives, point, batches) for point in points]
    vectors = [flat(point) for point in points]
    found = secant_smoothness(vectors, gradients)
    i, j = found.pair
    turned = (gradients[i] - gradients[j]).double()
    unit = turned / (turned.norm() * (vectors[i] - vectors[j]).double().norm())
    # Of the pair's secant to first order: what each part adds along the change of the gradient.
    each = []
    for part in parts:
        here, there = (_gradient(objectives, points[k], part).double() for k in (i, j))
        each.append(float(unit @ (here - there)))
    spread = _of_parts(each, parts, images)
    if spread.low is None or spread.high is None:
        return Estimate(found.value, None, None, images)
    half = (spread.high - spread.low) / 2
    return Estimate(found.value, found.value - half, found.value + half, images)


def _gradient(
    objectives: Sequence[Objective], point: Params, batches: Mapping[str, Batch]
) -> Tensor:
    return torch.stack([o.gradient(point, batches[o.task]) for o in objectives]).mean(0)


def _parts(batches: Mapping[str, Batch]) -> list[dict[str, Batch]]:
    """Return parts of each task's images, alike in size; fewer where a task has few images."""
    count = min(_PARTS, *(len(batch.inputs) for batch in batches.values()))
    return [
        {
            task: Batch(batch.inputs[k::count], labels_of(batch, task)[k::count])
            for task, batch in batches.items()
        }
        for k in range(count)
    ]


def _of_parts(
    values: Sequence[float], parts: Sequence[Mapping[str, Batch]], samples: int
) -> Estimate:
    """Return the mean over parts, weighed by their images, with its interval from their spread."""
    sizes = [sum(len(batch.inputs) for batch in part.values()) for part in parts]
    total = sum(sizes)
    mean = sum(v * size / total for v, size in zip(values, sizes, strict=True)) if total else 0.0
    if len(values) < 3:
        return Estimate(mean, None, None, samples)
    half = (
        student_quantile(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return Estimate(mean, mean - half, mean + half, samples)


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
