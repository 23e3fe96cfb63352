"""This file is the data of an evaluation: one loader for each task of a suite."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.data.batches import Batch, gather
from mergekit_lit.data.splits import Images, SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite

Split = Literal["train", "val", "test"]


class BatchShare:
    """Every world-th batch of the images, in order.

    Whole batches are dealt out, not images: a network may round differently in another batch, and
    scores must not depend on the number of processes.
    """

    def __init__(self, images: Images, *, batch: int, rank: int = 0, world: int = 1) -> None:
        """Deal out batches of N images; the last batch may be smaller.

        Args:
            images: N images.
            batch: images in one batch.
            rank: this process.
            world: number of processes.
        """
        self.images = images
        self.batch = batch
        self.starts = range(rank * batch, len(images), world * batch)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over (x uint8 (b, H, W, 3), y (b,), position (b,))."""
        for start in self.starts:
            stop = min(start + self.batch, len(self.images))
            yield gather(self.images, torch.arange(start, stop))


class MergeDataModule(LightningDataModule):
    """The images of one split of several tasks, each image once, in order.

    Under several processes each takes every world-th batch: no image is padded, none is dropped,
    and the batches are those of one process.

    Attributes:
        suite: name or folder of the suite.
        tasks: names of the tasks; None means all of the suite, until `setup` names them.
        split: which images.
        batch: images in one batch.
        task_data: every task's data, once `setup` has loaded it.
    """

    # Each argument is one flag of the command line, hence so many.
    def __init__(  # noqa: PLR0913
        self,
        suite: str = "embedded8",
        *,
        tasks: Sequence[str] | None = None,
        split: Split = "test",
        batch: int = 256,
        n: int | None = None,
        train_share: float = 1.0,
        val_share: float = 0.1,
        reserve: int = 64,
        split_seed: int = 0,
        size: int | None = None,
        root: Path | None = None,
        download: bool = False,
    ) -> None:
        """Choose the images; nothing is read before `setup`.

        Args:
            suite: name of a suite, or a folder with the user's own tasks.
            tasks: names of tasks of the suite; None for all.
            split: `train`, `val` or `test`.
            batch: images in one batch; scores depend on it by rounding alone.
            n: number of training samples that the experts used; None for all.
            train_share: share of the training samples that the experts used, in (0, 1].
            val_share: share of the training samples carved out for validation, in [0, 1).
            reserve: training samples carved out that no run trains on.
            split_seed: seed of the carve-outs and the subset.
            size: largest side to which images are decoded, in pixels; None keeps the source's.
            root: folder of the downloaded data sets; None for the default one.
            download: whether missing images may be fetched.

        Raises:
            KeyError: an unknown split.
            ValueError: `batch` below 1, or a task named twice or not at all.
        """
        super().__init__()
        # The folder differs from machine to machine: neither is a hyperparameter.
        self.save_hyperparameters(ignore=["root", "download"])
        if split not in get_args(Split):
            raise KeyError(unknown_name("split", split, get_args(Split)))
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, but is {batch}.")
        if tasks is not None and (not tasks or len(set(tasks)) < len(tasks)):
            raise ValueError(f"`tasks` must name each task once, but is {list(tasks)!r}.")
        self.suite, self.split, self.batch, self.root = suite, split, batch, root
        self.tasks = tuple(tasks) if tasks is not None else None
        self.options = SplitOptions(
            val_share=val_share, reserve=reserve, train_share=train_share, n=n, seed=split_seed
        )
        self.size, self.download = size, download
        self.task_data: tuple[TaskData, ...] = ()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (Lightning's signature)
        """Load the tasks, once.

        Raises:
            KeyError: an unknown suite or task.
            ValueError: a task without an image in the split.
        """
        if self.task_data:
            return
        suite = load_suite(self.suite, root=self.root)
        chosen = [suite.task(name) for name in self.tasks or suite.names]
        loaded = tuple(
            task.load(self.options, root=self.root, size=self.size, download=self.download)
            for task in chosen
        )
        for data in loaded:
            split_images(data, self.split)
        self.tasks = tuple(data.name for data in loaded)
        self.task_data = loaded

    def test_dataloader(self) -> list[BatchShare]:
        """Return one loader a task, with this process's share of the batches.

        The batches of all tasks are dealt out in turn, so that small tasks keep every process busy.

        Raises:
            ValueError: there are fewer batches than processes.
        """
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        shares, dealt = [], 0
        for task in self.task_data:
            images = split_images(task, self.split)
            turn = (rank - dealt) % world
            shares.append(BatchShare(images, batch=self.batch, rank=turn, world=world))
            dealt += -(-len(images) // self.batch)
        # Lightning calls no hook of a process without a batch, and the others would wait for it.
        if dealt < world:
            raise ValueError(
                f"`batch` must leave each of {world} processes a batch, but {self.batch} makes "
                f"{dealt} in all. Choose a smaller batch, or fewer devices."
            )
        return shares


def split_images(data: TaskData, split: str) -> Images:
    """Return the images of one split.

    Raises:
        KeyError: an unknown split.
        ValueError: the split is empty.
    """
    if split not in get_args(Split):
        raise KeyError(unknown_name("split", split, get_args(Split)))
    images: Images = getattr(data, split)
    if len(images) == 0:
        raise ValueError(
            f"The {split} split of {data.name!r} must hold an image, but is empty. "
            "Choose another split, or carve out more."
        )
    return images
