"""This file is norms of many tensors at once, in foreach kernels that stay on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, (count,), on the device of the first.

    Half precision is widened before, so that no norm is rounded to it.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = [tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors]
    device = tensors[0].device
    norms = torch._foreach_norm(wide)
    return torch.stack([norm.to(device) for norm in norms]).to(accumulator_dtype(device))


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return ||x||^2 of all tensors as one vector, on the device of the first."""
    return tensor_norms(tensors).square().sum()
