"""This file measures the constants of the bound, at the base and at a merge, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, drawn, in_batches
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.seeds import generator
from mergekit_lit.theory.curvature import (
    Eigenvalue,
    random_direction,
    rayleigh,
    secant_smoothness,
    top_eigenvalue,
)
from mergekit_lit.theory.facts import ALL, Gram
from mergekit_lit.theory.heterogeneity import (
    Estimate,
    TaskGradients,
    gradient_products,
    heterogeneity,
    mean_gradient_square,
    per_sample_square,
    task_noise,
)
from mergekit_lit.theory.objective import Objective, hessian_product, labels_of

# What the micro-batch gradients of all tasks may take.
_LARGEST_BYTES = 2**33


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is looked at.

    Attributes:
        micro_batches: K, micro-batches of each task, at least 2; 3 or more for intervals.
        batch: b, images in one, at least 1.
        hessian_images: images of each task that the Hessian is taken over.
        lanczos_steps: largest number of products with it.
        images: largest number of images of each task that a loss is taken over.
        seed: of every choice of images.
    """

    micro_batches: int = 8
    batch: int = 16
    hessian_images: int = 64
    lanczos_steps: int = 20
    images: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        least = {
            "micro_batches": 2,
            "batch": 1,
            "hessian_images": 1,
            "lanczos_steps": 1,
            "images": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"`{name}` must be at least {lowest}, but is {getattr(self, name)!r}."
                )

    def within(self, images: int) -> "Effort":
        """Return the effort with micro-batches that so many images of each task suffice for.

        What is estimated is of single images, whatever their number in a batch.
        """
        return replace(self, batch=max(1, min(self.batch, images // self.micro_batches)))


@dataclass(frozen=True)
class AtPoint:
    """What is known of the tasks' losses at one point x.

    Attributes:
        losses: F_Si(x), by task.
        noise: sigma_i^2, by task.
        zeta2: ||grad F_Si - grad F_S||^2, by task.
        gradient2: ||grad F_S(x)||^2, F_S = sum_i p_i F_Si.
        gram: <grad^l F_Si(x), grad^l F_Sj(x)> by block l of the parameters, (T, T) each.
    """

    losses: Mapping[str, float]
    noise: Mapping[str, Estimate]
    zeta2: Mapping[str, Estimate]
    gradient2: Estimate
    gram: Mapping[str, Gram]


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


def measure_point(
    objectives: Sequence[Objective],
    weights: Params,
    calibration: Calibration,
    *,
    p: Sequence[float],
    effort: Effort,
    blocks: Mapping[str, Sequence[str]] | None = None,
    losses: Mapping[str, float] | None = None,
) -> AtPoint:
    """Return losses, gradient norms, noise and heterogeneity at one point.

    Args:
        objectives: of T tasks, under the statistics that belong to the point.
        weights: x.
        calibration: training images of each task.
        p: weights of the tasks in the target.
        effort: how much is looked at.
        blocks: names of the parameters of each block; None makes one of all.
        losses: F_Si(x), where they are known already.

    Raises:
        ValueError: too few images for the micro-batches, or too many numbers for the memory.
    """
    gradients = task_gradients(objectives, weights, calibration, effort=effort)
    tasks = [objective.task for objective in objectives]
    return AtPoint(
        losses=losses or {o.task: mean_loss(o, weights, calibration, effort) for o in objectives},
        noise={task: task_noise(gradients, i) for i, task in enumerate(tasks)},
        zeta2={task: heterogeneity(gradients, i, p) for i, task in enumerate(tasks)},
        gradient2=mean_gradient_square(gradients, p),
        gram={
            name: gradient_products(gradients, _columns(weights, names))
            for name, names in (blocks or {ALL: list(weights)}).items()
        },
    )


def _columns(weights: Params, names: Sequence[str]) -> list[slice]:
    """Return where parameters lie in a flattened gradient."""
    found, start = {}, 0
    for name, tensor in weights.items():
        found[name] = slice(start, start + tensor.numel())
        start += tensor.numel()
    return [found[name] for name in names]


def task_gradients(
    objectives: Sequence[Objective], weights: Params, calibration: Calibration, *, effort: Effort
) -> TaskGradients:
    """Return gradients of each task's loss over micro-batches drawn from its images.

    The arguments are those of `measure_point`.

    Raises:
        ValueError: too few images for the micro-batches, or too many numbers for the memory.
    """
    _check_memory(weights, len(objectives), effort)
    rows, sizes = [], []
    for objective in objectives:
        samples = calibration.samples[objective.task]
        count = effort.micro_batches * effort.batch
        if len(samples) < count:
            raise ValueError(
                f"{effort.micro_batches} micro-batches of {effort.batch} need {count} images of "
                f"task {objective.task!r}, but there are {len(samples)}. Ask for fewer."
            )
        order = drawn(samples, count, "micro-batches", objective.task, seed=effort.seed)
        # Drawn ascending: a micro-batch of neighbours would hold one class.
        shuffled = torch.randperm(count, generator=generator(effort.seed, "order"))
        batches = [samples.take(part) for part in torch.split(order[shuffled], effort.batch)]
        rows.append(torch.stack([objective.gradient(weights, batch) for batch in batches]))
        sizes.append(len(samples))
    return TaskGradients(rows, effort.batch, sizes)


def mean_loss(
    objective: Objective, weights: Params, calibration: Calibration, effort: Effort
) -> float:
    """Return F_Si(x) over at most `effort.images` training images."""
    samples = calibration.samples[objective.task]
    total, seen = 0.0, 0
    chosen = drawn(samples, effort.images, "losses", objective.task, seed=effort.seed)
    with torch.no_grad():
        for batch in in_batches(samples, chosen):
            count = len(labels_of(batch, objective.task))
            total += float(objective.loss(weights, batch)) * count
            seen += count
    return total / seen


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
    start = random_direction(_flat(merged), effort.seed)
    origin = _flat(base)
    ends = _ends(experts, base)
    moved = {name: _flat(end) - origin for name, end in zip(experts.names, ends, strict=True)}
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
    return secant_smoothness([_flat(point) for point in points], gradients)


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


def _flat(params: Params) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])


def _check_memory(weights: Params, tasks: int, effort: Effort) -> None:
    numbers = sum(tensor.numel() for tensor in weights.values())
    needed = 4 * numbers * tasks * effort.micro_batches
    if needed > _LARGEST_BYTES:
        raise ValueError(
            f"{effort.micro_batches} micro-batch gradients of {tasks} tasks must fit into "
            f"{_LARGEST_BYTES / 2**30:.0f} GiB, but take {needed / 2**30:.1f} GiB. Ask for fewer "
            "micro-batches."
        )
