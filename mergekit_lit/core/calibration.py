"""This file is Calibration: what a merge method that looks at images is given."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.seeds import generator

DataSplit = Literal["train", "val", "test-unlabelled"]
"""Which images of a task a method looks at."""


@dataclass(frozen=True)
class Batch:
    """Some images of one task.

    Attributes:
        inputs: what the backbone takes, (b, *s).
        labels: classes, (b,); None where a method must not see them.
    """

    inputs: Tensor
    labels: Tensor | None


class Samples(Protocol):
    """The images of one task, made into batches when asked for."""

    def __len__(self) -> int:
        """Return how many there are."""

    def take(self, positions: Tensor) -> Batch:
        """Return the images at `positions` (b,), each in [0, len)."""


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer at work on one batch of b images.

    Its map is, row by row and group by group, output = input W^T + bias, with the weight W as g
    matrices of (m/g, n); g is 1 but for grouped convolutions.

    Attributes:
        output: what the layer returned, in the graph of the features.
        input_rows: returns what it was given, as rows (g, r, n); r counts images and places.
        output_rows: returns a tensor like `output` as rows (g, r, m/g).
    """

    output: Tensor
    input_rows: Callable[[], Tensor]
    output_rows: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A backbone as plain functions of its parameters; neither changes anything.

    Attributes:
        features: (params, inputs) -> features (b, d), differentiable in `params`.
        capture: (params, inputs, names) -> features, and the layers whose weights have these
            names. A layer that the forward pass does not call with its own weight is left out.
    """

    features: Callable[[Params, Tensor], Tensor]
    capture: Callable[[Params, Tensor, Collection[str]], tuple[Tensor, dict[str, Layer]]]


@dataclass(frozen=True)
class Calibration:
    """Images of the experts' tasks, and the networks to look at them with.

    An expert is looked at under the BatchNorm statistics of its own file. The model being merged is
    looked at as the merge's policy will have it: under `statistics`, or, where they are to be
    recalibrated, under those of the batch at hand.

    Attributes:
        split: which images these are.
        samples: the images of each task, by the experts' names.
        expert: the backbone under the statistics among its parameters.
        merged: the backbone as the BatchNorm policy has it.
        logits: (task, features (b, d)) -> logits (b, C) of the task's head.
        statistics: statistics of the model being merged; ignored where the batch's own are used.
        pooled: whether the batch is a mixture of all tasks, as under `recalibrate`.
        remade: makes it for other experts of the same tasks, whose heads or statistics differ; None
            where nothing above depends on them.
    """

    split: DataSplit
    samples: Mapping[str, Samples]
    expert: Network
    merged: Network
    logits: Callable[[str, Tensor], Tensor]
    statistics: Params = field(default_factory=dict)
    pooled: bool = False
    remade: Callable[[Experts], "Calibration"] | None = None

    def renewed(self, experts: Experts) -> "Calibration":
        """Return the calibration of these experts, as a veneer has changed them."""
        return self if self.remade is None else self.remade(experts)

    def merged_features(self, params: Params, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Return the features (b, d) of the model being merged, on a batch of each task.

        Args:
            params: its tensors; BatchNorm statistics among them give way to the policy's.
            batches: a batch of each task.
        """
        whole = {**params, **self.statistics}
        if not self.pooled:
            return {
                task: self.merged.features(whole, batch.inputs) for task, batch in batches.items()
            }
        together = self.merged.features(whole, torch.cat([b.inputs for b in batches.values()]))
        parts = torch.split(together, [len(batch.inputs) for batch in batches.values()])
        return dict(zip(batches, parts, strict=True))


def drawn(samples: Samples, count: int, *key: str | int, seed: int) -> Tensor:
    """Return the positions of at most `count` images, without replacement, ascending.

    Args:
        samples: the images of one task.
        count: how many, at least 1; all where there are fewer.
        key: names the draw, so that it does not depend on others.
        seed: of the draw.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"The number of images to look at must be at least 1, but is {count}.")
    order = torch.randperm(len(samples), generator=generator(seed, *key))
    return order[:count].sort().values


def in_batches(
    samples: Samples, positions: Tensor, *, size: int = 256, numbers: int = 2**20
) -> Iterator[Batch]:
    """Yield the images at `positions` in batches whose sizes differ by at most one.

    Args:
        samples: the images of one task.
        positions: (b,), in the order in which the images come.
        size: largest number of images in a batch.
        numbers: largest number of input numbers in a batch, one image excepted: what a pass holds
            in memory is a multiple of it.
    """
    if len(positions) == 0:
        return
    each = samples.take(positions[:1]).inputs.numel()
    fitting = max(1, min(size, numbers // each))
    for part in positions.tensor_split(-(-len(positions) // fitting)):
        yield samples.take(part)
