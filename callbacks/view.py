"""This file is what callbacks see of a training: parameters by group, samples, and the loggers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from mergekit_lit.data.splits import Images
from mergekit_lit.lit.data import TaskDataModule

BACKBONE, HEAD = "backbone", "head"


def moved_parameters(module: LightningModule, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer moves, by their names in the module, in its order.

    Parameters that the optimizer holds but that need no gradient are left out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters()
    return {name: p for name, p in named if id(p) in held and p.requires_grad}


def parameter_part(name: str) -> str:
    """Return the top-level part of the module that a parameter belongs to."""
    return name.partition(".")[0]


def parameter_group(module: LightningModule, name: str) -> str:
    """Return the layer group of a parameter.

    That is its block for backbones of known structure (`module.structure`, by names below
    `module.backbone`), and the top-level part of its name for everything else.
    """
    part, _, below = name.partition(".")
    structure = getattr(module, "structure", None)
    if part == BACKBONE and isinstance(structure, Mapping) and below in structure:
        return str(structure[below].group)
    return part


@dataclass(frozen=True)
class Samples:
    """The training data, to draw from.

    Attributes:
        n: training samples.
        batch: samples in one optimizer step, over all processes and accumulated micro-batches.
        take: returns the batch of these positions, as the training loader would.
    """

    n: int
    batch: int
    take: Callable[[Tensor], Any]


def training_samples(trainer: Trainer) -> Samples | None:
    """Return the training data, or None where it can only be iterated over."""
    accumulate = trainer.accumulate_grad_batches
    data = trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it untyped
    if isinstance(data, TaskDataModule):
        images = data.task_data.train
        return Samples(len(images), data.batch * accumulate, lambda at: _taken(images, at))
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    batch = loader.batch_size * accumulate * trainer.world_size
    return Samples(len(dataset), batch, lambda at: collate([dataset[i] for i in at.tolist()]))


def _taken(images: Images, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what our training loader hands out: images, labels, positions."""
    rows = at.numpy()
    return torch.from_numpy(images.x[rows]), torch.from_numpy(images.y[rows]), at


def step_ended(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether the micro-batch that just ended completed an optimizer step.

    The last micro-batch of an epoch completes one too, however few were accumulated.
    """
    full = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return full or trainer.is_last_batch


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether the optimizer step that just ended is one that the Trainer logs."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # Lightning sets it untyped
    return every > 0 and trainer.global_step % every == 0


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand numbers to the loggers, and to whoever monitors `trainer.callback_metrics`.

    `LightningModule.log` would turn each number into a tensor of the device and read each back,
    one synchronisation each; here the numbers have been read already, all at once. NaN and infinity
    are left out: neither JSON nor a curve can hold them.
    """
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    # Lightning's own step of a row, so that these numbers stand beside its losses.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(finite, step=step)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in finite.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
