"""This file is second moments: of what reaches a layer, and of what the loss asks of its output."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, Network, drawn, in_batches
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params


def matrix_names(experts: Experts) -> list[str]:
    """Return the names of the weights of linear and convolution layers, sorted."""
    return [
        name
        for name in experts.merged_names()
        if experts.structure[name].kind in ("linear", "convolution")
        and experts.base[name].ndim >= 2
    ]


def check_samples(samples: int, *, least: int = 1) -> None:
    """Refuse a largest number of images that leaves too few.

    Raises:
        ValueError: fewer than the least.
    """
    if samples < least:
        raise ValueError(f"`samples` must be at least {least}, but is {samples!r}.")


def looks(calibration: Calibration, t: int, task: str, samples: int, seed: int) -> Iterator[Batch]:
    """Yield at most `samples` images of task t, in batches; the same at each call."""
    images = calibration.samples[task]
    return in_batches(images, drawn(images, samples, "images", t, seed=seed))


@torch.no_grad()
def input_moments(
    network: Network, params: Params, batches: Iterable[Batch], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return G = E[x x^T] of the rows x that reach each layer, (g, n, n), in float64.

    Args:
        network: the backbone.
        params: its parameters.
        batches: images; each row of each image counts alike.
        names: weights of layers; those that cannot be captured are left out.
    """
    sums: dict[str, Tensor] = {}
    rows_seen: Counter[str] = Counter()
    for batch in batches:
        _, layers = network.capture(params, batch.inputs, names)
        for name, layer in layers.items():
            rows = layer.input_rows()
            gram = (rows.mT @ rows).double()
            sums[name] = sums[name] + gram if name in sums else gram
            rows_seen[name] += rows.shape[1]
    return {name: gram / rows_seen[name] for name, gram in sums.items()}


def as_matrices(tensor: Tensor, groups: int) -> Tensor:
    """Return a weight as one matrix per group, (g, m / g, n), in float64."""
    matrix = tensor.double().flatten(1)
    return matrix.reshape(groups, len(matrix) // groups, matrix.shape[1])


def looks_together(
    calibration: Calibration, tasks: Sequence[str], samples: int, seed: int
) -> Iterator[dict[str, Batch]]:
    """Yield a batch of each task at a time, until no task has images left; `looks` of all tasks.

    The batches are large, as the statistics of a merged model's BatchNorm may be the batch's own.
    """
    numbers = 2**23 // len(tasks) if calibration.pooled else 2**23
    passes = []
    for t, task in enumerate(tasks):
        images = calibration.samples[task]
        positions = drawn(images, samples, "images", t, seed=seed)
        passes.append(in_batches(images, positions, numbers=numbers))
    for batches in zip_longest(*passes):
        yield {task: b for task, b in zip(tasks, batches, strict=True) if b is not None}
