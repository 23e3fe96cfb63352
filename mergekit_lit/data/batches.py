"""This file feeds images: training batches in a seeded order, evaluation batches once over."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.core.seeds import generator
from mergekit_lit.data.splits import Images

Batch = tuple[Tensor, Tensor, Tensor]


class StepLoader:
    """Training batches for a given number of steps: without replacement inside an epoch.

    Each item is (x uint8 (b, H, W, 3), y int64 (b,), position int64 (b,)), b = batch / world. The
    order is a function of (n, batch, seed) alone, so any number of ranks sees the same batches.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch: int,
        steps: int,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        """Make a loader of exactly steps * accumulate micro-batches.

        Args:
            images: n training images.
            batch: images in one micro-batch over all ranks; may exceed n.
            steps: optimizer steps K.
            seed: seed of the order.
            accumulate: micro-batches in one optimizer step.
            rank: this process, which takes the rank-th contiguous share of each micro-batch.
            world: number of processes; divides `batch`.
            start: micro-batches already done, skipped when a run resumes.

        Raises:
            ValueError: a number is out of range, or there are no images.
        """
        _check_positive(batch=batch, steps=steps, accumulate=accumulate, world=world)
        _check_rank(rank, world)
        if batch % world:
            raise ValueError(
                f"`batch` must be a multiple of the {world} processes, but is {batch}. "
                f"Choose {batch - batch % world or world} or {batch + world - batch % world}."
            )
        if len(images) == 0:
            raise ValueError("`images` must hold at least one image to train on, but is empty.")
        if not 0 <= start <= steps * accumulate:
            raise ValueError(f"`start` must lie in 0..{steps * accumulate}, but is {start}.")
        self.images = images
        self.batch = batch
        self.seed = seed
        self.start = start
        self.stop = steps * accumulate
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the micro-batches that are left."""
        batches = batch_positions(len(self.images), self.batch, self.seed, start=self.start)
        for _, positions in zip(range(len(self)), batches, strict=False):
            yield gather(self.images, positions[self.share])


class EvalLoader:
    """Every image exactly once, in order; ranks share them without padding or duplicates.

    Each item is (x uint8 (b, H, W, 3), y int64 (b,), position int64 (b,)).
    """

    def __init__(self, images: Images, *, batch: int = 256, rank: int = 0, world: int = 1) -> None:
        """Make a loader over the rank-th contiguous share of `images`.

        Args:
            images: N images; none is allowed.
            batch: images in one batch; the last may be smaller.
            rank: this process.
            world: number of processes; some may get one image more than others.

        Raises:
            ValueError: a number is out of range.
        """
        _check_positive(batch=batch, world=world)
        _check_rank(rank, world)
        self.images = images
        self.batch = batch
        self.first = rank * len(images) // world
        self.last = (rank + 1) * len(images) // world

    def __len__(self) -> int:
        return len(range(self.first, self.last, self.batch))

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches."""
        for start in range(self.first, self.last, self.batch):
            yield gather(self.images, torch.arange(start, min(start + self.batch, self.last)))


def batch_positions(n: int, batch: int, seed: int, *, start: int = 0) -> Iterator[Tensor]:
    """Yield the positions of micro-batch `start`, `start` + 1, ..., without end.

    Epoch e is a permutation of 0..n-1 drawn from (seed, "order", e). Its last incomplete batch is
    dropped; where n < batch, batches run on across the borders of epochs instead.
    """
    if n >= batch:
        per_epoch = n // batch
        epoch, first = divmod(start, per_epoch)
        while True:
            order = _order(n, seed, epoch)
            for k in range(first, per_epoch):
                yield order[k * batch : (k + 1) * batch]
            epoch, first = epoch + 1, 0
    epoch, skipped = divmod(start * batch, n)
    waiting = _order(n, seed, epoch)[skipped:]
    while True:
        while len(waiting) < batch:
            epoch += 1
            waiting = torch.cat([waiting, _order(n, seed, epoch)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def gather(images: Images, positions: Tensor) -> Batch:
    """Return (x, y, position) of the images at `positions`, copied."""
    index = positions.numpy()
    x = torch.from_numpy(np.ascontiguousarray(images.x[index]))
    return x, torch.from_numpy(images.y[index]), positions


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {number}.")


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"`rank` must lie in 0..{world - 1}, but is {rank}.")
