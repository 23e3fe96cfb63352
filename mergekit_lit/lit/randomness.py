"""This file starts the random stream that a forward pass draws from, and names its place."""

import torch
from lightning.pytorch import Trainer


def seed_stream(seed: int, device: torch.device) -> None:
    """Start torch's global streams of the CPU and, off it, of the devices.

    On the CPU no state of CUDA is touched: `torch.manual_seed` would queue a call, with the whole
    traceback, for each device that has not been used yet.

    Args:
        seed: in [0, 2**63).
        device: where the forward pass runs.
    """
    seeded = torch.default_generator if device.type == "cpu" else torch
    seeded.manual_seed(seed)


def slot_of(trainer: Trainer, batch_idx: int) -> int:
    """Return which micro-batch of its step a batch is, over accumulation and processes."""
    accumulated = batch_idx % trainer.accumulate_grad_batches
    return accumulated * trainer.world_size + trainer.global_rank
