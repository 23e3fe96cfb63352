"""This file packs booleans eight to a byte, as masks are stored."""

import torch
from torch import Tensor
from torch.nn.functional import pad

_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """Return booleans of any shape as ceil(n / 8) bytes, the first one in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    rows = pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    return (rows * _PLACES).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the booleans of a shape that `pack` wrote.

    Raises:
        ValueError: the bytes are not those of so many booleans.
    """
    count = shape.numel()
    if packed.numel() != -(-count // 8):
        raise ValueError(
            f"A mask of shape {tuple(shape)} must be packed into {-(-count // 8)} bytes, but there "
            f"are {packed.numel()}. Merge again."
        )
    bits = (packed[:, None] & _PLACES) != 0
    return bits.reshape(-1)[:count].reshape(shape)
