"""This file is sums over all entries of a tensor, to the same bits for any number of threads."""

import torch
from torch import Tensor
from torch.nn.functional import pad

# Below the size from which torch shares one sum among threads.
_BLOCK = 4096


def total(values: Tensor) -> Tensor:
    """Return the sum of all entries, in float64, 0-dimensional; 0 of none."""
    rest = values.reshape(-1)
    if rest.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    while rest.numel() > 1 or rest.dtype != torch.float64:
        rest = _blocks(rest).sum(dim=-1, dtype=torch.float64)
    return rest[0]


def gram(rows: Tensor) -> Tensor:
    """Return the inner products <x_s, x_t> of T vectors, rows (T, n) -> (T, T), in float64."""
    blocks = _blocks(rows.double()).transpose(0, 1)  # (n / block, T, block)
    products = blocks @ blocks.mT
    return torch.stack([total(entry) for entry in products.flatten(1).T]).reshape(
        len(rows), len(rows)
    )


def _blocks(values: Tensor) -> Tensor:
    """Return the last axis cut into blocks, the last one filled up with zeros."""
    filled = pad(values, (0, -values.shape[-1] % _BLOCK))
    return filled.reshape(*values.shape[:-1], filled.shape[-1] // _BLOCK, _BLOCK)
