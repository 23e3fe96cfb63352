"""This file is exact order statistics of all entries of a model, in two passes of little memory."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[Tensor]]
"""Starts a pass over all entries: tensors (T, n), one row an expert, of any n."""

_BINS = 1 << 16


def smallest(chunks: Chunks, ranks: Callable[[int], Sequence[int]]) -> Tensor:
    """Return per expert the values of given ranks among all its entries, exactly.

    Two passes, whatever the size: count the entries by the upper half of their float32 bit
    pattern, put into the order of the numbers; then collect the bins that hold the ranks.

    Args:
        chunks: starts a pass over the entries; called twice.
        ranks: tells, from the number of entries of an expert, R ranks: 1 for the smallest, up to
            the number of entries for the largest; 0 gives minus infinity.

    Returns:
        Values, (T, R), in float64; (0, 0) where there are no entries.
    """
    below = _counts(chunks).cumsum(dim=1)  # (T, bins)
    if below.numel() == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    wanted = torch.tensor(ranks(int(below[0, -1]))).repeat(len(below), 1)  # (T, R)
    bins = torch.searchsorted(below, wanted)
    before = torch.where(bins > 0, below.gather(1, (bins - 1).clamp(min=0)), 0)
    found: list[list[list[Tensor]]] = [[[] for _ in row] for row in bins]
    for values in chunks():
        for t, (row, keys) in enumerate(zip(values.double(), _keys(values), strict=True)):
            for r, key in enumerate(bins[t]):
                found[t][r].append(row[keys == key])
    return torch.stack(
        [
            torch.stack([_value(parts, rank) for parts, rank in zip(*rows, strict=True)])
            for rows in zip(found, wanted - before, strict=True)
        ]
    )


def threshold(values: Tensor, density: float) -> Tensor:
    """Return the (n - floor(n * density))-th smallest of n values, 0-dimensional; 0 for all."""
    rank = values.numel() - int(values.numel() * density)
    if rank == 0:
        return torch.zeros((), dtype=values.dtype)
    return values.reshape(-1).kthvalue(rank).values


def _counts(chunks: Chunks) -> Tensor:
    """Return how many entries of each expert fall into each bin, (T, bins)."""
    counts = torch.zeros(0, _BINS, dtype=torch.int64)
    for values in chunks():
        rows = [row.bincount(minlength=_BINS) for row in _keys(values)]
        counts = torch.stack(rows) + (counts if len(counts) else 0)
    return counts


def _keys(values: Tensor) -> Tensor:
    """Return numbers in [0, bins) that are ordered like the values, of their shape."""
    pattern = values.float().contiguous().view(torch.int32)
    # Negative floats order by the complement of their magnitude's bits.
    ordered = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
    return (ordered >> 16).long() + _BINS // 2


def _value(parts: list[Tensor], rank: Tensor) -> Tensor:
    """Return the rank-th smallest entry of one bin, 0-dimensional."""
    if rank < 1:
        return torch.tensor(-torch.inf, dtype=torch.float64)
    return torch.cat(parts).kthvalue(int(rank)).values
