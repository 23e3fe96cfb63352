"""This file is exact order statistics of all entries of a model, in two passes of little memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.core.experts import BLOCK

Pairs = Iterable[tuple[str, Tensor]]
"""Name and deltas (T, *s) of every merged tensor; may be gone through more than once."""

Function = Callable[[Tensor], Tensor]
"""What is looked at of each entry of the deltas, (T, *s) -> (T, *s)."""

Chunks = Callable[[], Iterable[Tensor]]
"""Starts a pass over all entries: tensors (T, n), one row an expert, of any n."""

_BINS = 1 << 16
_SAMPLE = 1 << 18

# Sorting takes as long as looking at every value for so many brackets.
_FEW = 3


@runtime_checkable
class Sampled(Protocol):
    """Pairs of which some entries can be had without a pass over all, as `passes.Pairs` can."""

    def sample(self, count: int) -> tuple[Tensor, int]:
        """Return about `count` even entries of each expert, (T, m); and how many it has in all."""


def smallest(pairs: Pairs, function: Function, ranks: Callable[[int], Sequence[int]]) -> Tensor:
    """Return per expert the values of given ranks among all its entries, exactly.

    A sample brackets each value; a pass over all entries counts those below the bracket and
    collects those inside it. Where a sample was misleading, a count by bit pattern takes its place.

    Args:
        pairs: gone through once, twice if they cannot be `Sampled`; thrice after a bad sample.
        function: what is ranked: f(deltas).
        ranks: tells, from the number of entries of an expert, R ranks: 1 for the smallest, up to
            the number of entries for the largest; 0 gives minus infinity.

    Returns:
        Values, (T, R), in float64; (0, R) where there are no entries.
    """

    def chunks() -> Iterator[Tensor]:
        for _, deltas in pairs:
            yield function(deltas).reshape(len(deltas), deltas[0].numel())

    sample, entries = _sample(pairs, function, chunks)
    wanted = list(ranks(entries))
    if entries == 0:
        return torch.zeros(0, len(wanted), dtype=torch.float64)
    brackets = [[_bracket(row, rank / entries) for rank in wanted] for row in sample]
    del sample
    found = _inside(chunks, brackets, wanted, entries)
    return _by_counting(chunks, wanted) if found is None else found


def threshold(values: Tensor, density: float) -> Tensor:
    """Return the (n - floor(n * density))-th smallest of n values, 0-dimensional; 0 for all."""
    rank = values.numel() - int(values.numel() * density)
    if rank == 0:
        return torch.zeros((), dtype=values.dtype)
    return values.reshape(-1).kthvalue(rank).values


def _sample(pairs: Pairs, function: Function, chunks: Chunks) -> tuple[np.ndarray, int]:
    """Return evenly spaced entries of each expert, sorted, (T, m); and how many it has in all."""
    if isinstance(pairs, Sampled):
        taken, entries = pairs.sample(_SAMPLE)
        # Functions hold several times what they are given.
        ranked = torch.cat(
            [function(part) for part in torch.split(taken, BLOCK, dim=1)], dim=1
        ).numpy()
        # In place: what was taken is nobody else's.
        ranked.sort(axis=1)
        return ranked, entries
    parts: list[np.ndarray] = []
    stride, count, entries = 1, 0, 0
    for values in chunks():
        entries += values.shape[1]
        # A view would keep the whole chunk in memory.
        parts.append(values.numpy()[:, ::stride].copy())
        count += parts[-1].shape[1]
        if count > _SAMPLE:
            parts = [np.concatenate(parts, axis=1)[:, ::2].copy()]
            count, stride = parts[0].shape[1], 2 * stride
    return np.sort(np.concatenate(parts, axis=1), axis=1) if parts else np.zeros((0, 0)), entries


def _bracket(ordered: np.ndarray, share: float) -> tuple[float, float]:
    """Return bounds that a share of all entries lies below, by a sample in order."""
    # 6 standard deviations of a share, if the sample were drawn at random, and a few entries.
    place = share * len(ordered)
    slack = 6 * math.sqrt(place * (1 - share)) + 6
    low, high = math.floor(place - slack), math.ceil(place + slack)
    return (
        float(ordered[low]) if low >= 0 else -math.inf,
        float(ordered[high]) if high < len(ordered) else math.inf,
    )


def _inside(
    chunks: Chunks,
    brackets: list[list[tuple[float, float]]],
    wanted: Sequence[int],
    entries: int,
) -> Tensor | None:
    """Return the values of the ranks, (T, R), or None where one lies outside its bracket."""
    below = np.zeros((len(brackets), len(wanted)), dtype=np.int64)
    # Twice what a bracket of a random sample holds at most: memory that is not written costs none.
    expected = math.ceil(entries * 12 / math.sqrt(min(entries, _SAMPLE)))
    found = [[_Growing(min(entries, expected)) for _ in wanted] for _ in brackets]
    for values in chunks():
        for t, row in enumerate(values.numpy()):
            for r, (count, inside) in enumerate(_cut(row, brackets[t])):
                below[t, r] += count
                found[t][r].append(inside)
    result = torch.full(below.shape, -torch.inf, dtype=torch.float64)
    for t, r in np.ndindex(below.shape):
        collected = found[t][r].values
        rank = wanted[r] - int(below[t, r])
        if wanted[r] >= 1 and not 1 <= rank <= len(collected):
            return None
        if wanted[r] >= 1:
            result[t, r] = float(np.partition(collected, rank - 1)[rank - 1])
    return result


def _cut(row: np.ndarray, brackets: list[tuple[float, float]]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield for each bracket how many values of a row lie below it, and those inside it."""
    if len(brackets) > _FEW:
        ordered = np.sort(row)
        lows, highs = np.array(brackets, dtype=row.dtype).T
        starts = ordered.searchsorted(lows).tolist()
        ends = ordered.searchsorted(highs, side="right").tolist()
        yield from ((s, ordered[s:e]) for s, e in zip(starts, ends, strict=True))
        return
    for low, high in brackets:
        inside = row >= row.dtype.type(low)
        count = len(row) - int(np.count_nonzero(inside))
        inside &= row <= row.dtype.type(high)
        yield count, row[inside]


class _Growing:
    """Values in one array, as large as expected, that doubles when it is full.

    Many small arrays, kept among large ones that come and go, would tear the heap into pieces too
    small for the next large one, until it is several times as large as what it holds.
    """

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._held = np.empty(0)
        self._count = 0

    @property
    def values(self) -> np.ndarray:
        """What was appended so far."""
        return self._held[: self._count]

    def append(self, values: np.ndarray) -> None:
        """Copy values to the end."""
        count = self._count + len(values)
        if count > len(self._held):
            grown = np.empty(max(self._expected, 2 * count), dtype=values.dtype)
            grown[: self._count] = self.values
            self._held = grown
        self._held[self._count : count] = values
        self._count = count


def _by_counting(chunks: Chunks, wanted: Sequence[int]) -> Tensor:
    """Return the values of the ranks, (T, R), whatever the entries.

    Two passes: count the entries by the upper half of their float32 bit pattern, put into the
    order of the numbers; then collect the bins that hold the ranks.
    """
    below = _counts(chunks).cumsum(dim=1)  # (T, bins)
    rows = torch.tensor(wanted).repeat(len(below), 1)  # (T, R)
    bins = torch.searchsorted(below, rows)
    before = torch.where(bins > 0, below.gather(1, (bins - 1).clamp(min=0)), 0)
    found: list[list[list[Tensor]]] = [[[] for _ in row] for row in bins]
    for values in chunks():
        for t, (row, keys) in enumerate(zip(values.double(), _keys(values), strict=True)):
            for r, key in enumerate(bins[t]):
                found[t][r].append(row[keys == key])
    return torch.stack(
        [
            torch.stack([_value(parts, rank) for parts, rank in zip(*both, strict=True)])
            for both in zip(found, rows - before, strict=True)
        ]
    )


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
