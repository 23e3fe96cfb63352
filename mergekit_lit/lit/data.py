"""This file is the data of fine-tuning: one task's training steps, and its val and test images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from mergekit_lit.core.seeds import generator
from mergekit_lit.data.batches import Batch, EvalLoader, StepLoader
from mergekit_lit.data.splits import Images, SplitOptions, TaskData, neighbour
from mergekit_lit.data.suites import load_suite
from mergekit_lit.data.transforms import augment

_EVAL_BATCH = 256


class WholeRun:
    """Training batches from some step on, counted from the run's beginning, as Lightning does.

    It has the methods of a resumable loader, but no state: the step that a run goes on at says all.
    """

    def __init__(self, rest: StepLoader, batches: int) -> None:
        """Hold the batches that are left of `batches`."""
        self.rest, self.batches = rest, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.rest)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Need nothing."""


class TaskDataModule(LightningDataModule):
    """One task of a suite, or a neighbouring data set of it, in steps rather than epochs.

    Batches are (images uint8 (b, H, W, 3), labels (b,), positions (b,)); the position tells which
    training sample it is. The order depends on the module's `seed` alone, so that a run that stops
    and goes on sees the batches of one that did not stop. The Trainer's `max_steps` must be K.

    Attributes:
        task_data: the images of each split, after `setup`.
    """

    task_data: TaskData

    # Each argument is one flag of the command line, hence so many.
    def __init__(  # noqa: PLR0913
        self,
        suite: str = "embedded8",
        task: str = "mnist",
        *,
        batch: int = 32,
        n: int | None = None,
        train_share: float = 1.0,
        val_share: float = 0.1,
        reserve: int = 64,
        split_seed: int = 0,
        neighbour: int = 0,
        neighbour_seed: int = 0,
        augment: str = "none",
        size: int | None = None,
        root: Path | None = None,
        download: bool = False,
    ) -> None:
        """Choose the task; nothing is read before `setup`.

        Args:
            suite: name of a suite, or a folder with the user's own tasks.
            task: name of a task of the suite.
            batch: samples in one micro-batch over all processes; gradient accumulation multiplies
                it.
            n: number of training samples to use, drawn by `split_seed`; None for all.
            train_share: share of the training samples to use, in (0, 1].
            val_share: share of the training samples carved out for validation, in [0, 1).
            reserve: training samples carved out that no run trains on.
            split_seed: seed of the carve-outs and the subset.
            neighbour: m, training samples replaced by samples of the reserve; 0 for none.
            neighbour_seed: seed of the positions that are replaced.
            augment: `none`, `flip`, `crop` or `crop-flip`.
            size: largest side to which images are decoded, in pixels; None keeps the source's.
            root: folder of the downloaded data sets; None for the default one.
            download: whether missing images may be fetched.
        """
        super().__init__()
        # The folder differs from machine to machine: neither is a hyperparameter.
        self.save_hyperparameters(ignore=["root", "download"])
        self.suite, self.task, self.batch, self.root = suite, task, batch, root
        self.options = SplitOptions(
            val_share=val_share, reserve=reserve, train_share=train_share, n=n, seed=split_seed
        )
        self.replaced, self.neighbour_seed = neighbour, neighbour_seed
        self.augmentation, self.size, self.download = augment, size, download

    @classmethod
    def of(cls, trainer: Trainer) -> "TaskDataModule":
        """Return the data module of a Trainer.

        Raises:
            TypeError: the Trainer has another kind.
        """
        data = trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it untyped
        if not isinstance(data, cls):
            raise TypeError(
                f"ExpertModule must be trained on a TaskDataModule, but got {type(data).__name__}. "
                "Pass trainer.fit(module, datamodule=TaskDataModule(...))."
            )
        return data

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (Lightning's signature)
        """Read the task and make its splits, once."""
        if not hasattr(self, "task_data"):
            task = load_suite(self.suite, root=self.root).task(self.task)
            data = task.load(self.options, root=self.root, size=self.size, download=self.download)
            if self.replaced:
                data = neighbour(data, self.replaced, self.neighbour_seed)
            self.task_data = data

    def train_dataloader(self) -> WholeRun:
        """Return K steps of micro-batches, from the step that a resumed run goes on at.

        Raises:
            ValueError: the Trainer has no number of steps.
        """
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise ValueError(
                f"The Trainer's `max_steps` must be the number of steps K, at least 1, but is "
                f"{trainer.max_steps}. Pass Trainer(max_steps=K)."
            )
        accumulate = trainer.accumulate_grad_batches
        rest = StepLoader(
            self.task_data.train,
            steps=trainer.max_steps,
            batch=self.batch,
            accumulate=accumulate,
            seed=cast("int", trainer.lightning_module.seed),
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=trainer.global_step * accumulate,
        )
        return WholeRun(rest, trainer.max_steps * accumulate)

    def val_dataloader(self) -> EvalLoader:
        """Return the validation images once, each on one process."""
        return self._once(self.task_data.val)

    def test_dataloader(self) -> EvalLoader:
        """Return the test images once, each on one process."""
        return self._once(self.task_data.test)

    def augmented(self, x: Tensor, *key: str | int, seed: int) -> Tensor:
        """Return training images with the augmentation that `seed` and the parts of `key` draw."""
        if self.augmentation == "none":
            return x
        return augment(x, self.augmentation, generator(seed, "augment", *key))

    def _once(self, images: Images) -> EvalLoader:
        trainer = self._trainer()
        return EvalLoader(
            images, batch=_EVAL_BATCH, rank=trainer.global_rank, world=trainer.world_size
        )

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise ValueError("TaskDataModule must be attached to a Trainer: call trainer.fit(...).")
        return self.trainer
