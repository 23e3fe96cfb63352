"""This file starts the random stream that a forward pass draws from."""

import torch


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
