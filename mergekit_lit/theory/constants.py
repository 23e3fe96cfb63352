"""This file measures the constants of the bound, at the base and at a merge, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mergekit_lit.core.calibration import Calibration, drawn, in_batches
from mergekit_lit.core.params import Params, flat
from mergekit_lit.core.seeds import generator
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import ALL, Gram
from mergekit_lit.theory.heterogeneity import (
    Estimate,
    TaskGradients,
    gradient_products,
    heterogeneity,
    mean_gradient_square,
    mean_slopes,
    task_noise,
)
from mergekit_lit.theory.objective import Objective, labels_of

# What the micro-batch gradients of all tasks may take.
_LARGEST_BYTES = 2**33


@dataclass(frozen=True)
class AtPoint:
    """What is known of the tasks' losses at one point x.

    Attributes:
        losses: F_Si(x), by task.
        noise: sigma_i^2, by task.
        zeta2: ||grad F_Si - grad F_S||^2, by task.
        gradient2: ||grad F_S(x)||^2, F_S = sum_i p_i F_Si.
        gram: <grad^l F_Si(x), grad^l F_Sj(x)> by block l of the parameters, (T, T) each.
        own_gradient2: ||grad F_Si(x)||^2, by task.
        slopes: <grad F_Si(x), v> along the direction that was asked for, by task.
    """

    losses: Mapping[str, float]
    noise: Mapping[str, Estimate]
    zeta2: Mapping[str, Estimate]
    gradient2: Estimate
    gram: Mapping[str, Gram]
    own_gradient2: Mapping[str, Estimate]
    slopes: Mapping[str, Estimate] = field(default_factory=dict)


def measure_point(
    objectives: Sequence[Objective],
    weights: Params,
    calibration: Calibration,
    *,
    p: Sequence[float],
    effort: Effort,
    blocks: Mapping[str, Sequence[str]] | None = None,
    losses: Mapping[str, float] | None = None,
    direction: Params | None = None,
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
        direction: v, by the names of x, where slopes along one are asked for.

    Raises:
        ValueError: too few images for the micro-batches, or too many numbers for the memory.
    """
    gradients = task_gradients(objectives, weights, calibration, effort=effort)
    tasks = [objective.task for objective in objectives]
    along = None if direction is None else flat(direction)[None]
    return AtPoint(
        losses=losses or {o.task: mean_loss(o, weights, calibration, effort) for o in objectives},
        noise={task: task_noise(gradients, i) for i, task in enumerate(tasks)},
        zeta2={task: heterogeneity(gradients, i, p) for i, task in enumerate(tasks)},
        gradient2=mean_gradient_square(gradients, p),
        gram={
            name: gradient_products(gradients, columns_of(weights, names))
            for name, names in (blocks or {ALL: list(weights)}).items()
        },
        own_gradient2={
            task: mean_gradient_square(alone, [1.0]) for task, alone in _by_task(gradients, tasks)
        },
        slopes={}
        if along is None
        else {
            task: mean_slopes(alone, [1.0], along, [slice(None)])[0]
            for task, alone in _by_task(gradients, tasks)
        },
    )


def _by_task(gradients: TaskGradients, tasks: Sequence[str]) -> Iterator[tuple[str, TaskGradients]]:
    """Yield the gradients of each task alone."""
    for task, rows, size in zip(tasks, gradients.rows, gradients.sizes, strict=True):
        yield task, TaskGradients([rows], gradients.batch, [size])


def columns_of(weights: Params, names: Sequence[str]) -> list[slice]:
    """Return where some of the weights lie in a flattened gradient, in the order of `names`."""
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


def _check_memory(weights: Params, tasks: int, effort: Effort) -> None:
    numbers = sum(tensor.numel() for tensor in weights.values())
    needed = 4 * numbers * tasks * effort.micro_batches
    if needed > _LARGEST_BYTES:
        raise ValueError(
            f"{effort.micro_batches} micro-batch gradients of {tasks} tasks must fit into "
            f"{_LARGEST_BYTES / 2**30:.0f} GiB, but take {needed / 2**30:.1f} GiB. Ask for fewer "
            "micro-batches."
        )
