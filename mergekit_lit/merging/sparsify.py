"""This file is the methods that keep a share of each delta's entries: TIES, DARE, MagMax."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import generator
from mergekit_lit.merging.configuration import check_scale

Pairs = Iterable[tuple[str, Tensor]]
"""Name and deltas (T, *s) of every merged tensor; may be gone through more than once."""


def trim_and_elect(pairs: Pairs, *, density: float) -> dict[str, Tensor]:
    """Find what TIES needs of the whole model: a threshold per expert, and the majority sign.

    threshold_t = the (d - floor(d * density))-th smallest |tau_t| over all d entries, exactly.
    """
    thresholds = magnitude_thresholds(pairs, density=density)
    signs = torch.zeros((), dtype=torch.int64)
    for _, deltas in pairs:
        total = _trimmed(deltas, thresholds).sum(dim=0)
        signs += total.sign().sum(dtype=torch.float64).long()
    return {"thresholds": thresholds, "majority": signs.sign()}


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Yadav et al. 2023, arXiv:2306.01708, alg. 1",
    search={"density": (0.05, 1.0), "scale": (0.0, 3.0)},
    prepare=trim_and_elect,
)
def ties(
    tensor: Slice,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    combine: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Keep the largest entries, elect a sign, combine what agrees.

    m_tp = [|tau_tp| >= threshold_t],  s_p = sign(sum_t m_tp tau_tp),
    step_p = scale * mean (or sum) over {t: sign(m_tp tau_tp) = s_p} of tau_tp

    Args:
        tensor: deltas (T, *s), and the thresholds of the whole model.
        density: share of each task vector's entries that is kept, in (0, 1].
        scale: length of the step, unitless, >= 0.
        combine: `mean` over the experts that agree, or their `sum`.

    Returns:
        The step, (*s).

    Source: Yadav et al. 2023, arXiv:2306.01708, alg. 1; the threshold over all entries at once and
        the majority sign for exact ties are the published code's.
    """
    _check_density(density)
    check_scale(scale)
    kept = _trimmed(tensor.deltas, tensor.stats["thresholds"])
    sign = kept.sum(dim=0).sign()
    sign = torch.where(sign == 0, tensor.stats["majority"].to(sign.dtype), sign)
    agree = kept * ((kept.sign() == sign) & (kept != 0))
    total = agree.sum(dim=0)
    if combine == "mean":
        total = total / (agree != 0).sum(dim=0).clamp(min=1)
    return scale * total


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Yu et al. 2024, arXiv:2311.03099, eq. 3",
    search={"drop": (0.0, 0.99), "scale": (0.0, 1.5)},
    order="an expert's draws are keyed by its place among the experts",
)
def dare(tensor: Slice, *, drop: float = 0.5, scale: float = 0.3, rescale: bool = True) -> Tensor:
    """Drop entries at random, rescale the others, and sum.

    m_tp ~ Bernoulli(1 - drop),  step = scale * sum_t m_t tau_t / (1 - drop)

    Args:
        tensor: deltas (T, *s); the draws depend on seed, tensor name and expert alone.
        drop: share of the entries that is dropped, in [0, 1).
        scale: lambda, the weight of every task vector, unitless, >= 0.
        rescale: divide by 1 - drop, so that the mean of every entry stays.

    Returns:
        The step, (*s).

    Source: Yu et al. 2024, arXiv:2311.03099, eq. 3, followed by task arithmetic.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"`drop` must lie in [0, 1), but is {drop!r}.")
    check_scale(scale)
    total = torch.zeros_like(tensor.deltas[0])
    for expert, delta in enumerate(tensor.deltas):
        draw = generator(tensor.seed, tensor.name, expert)
        total = total + delta * (torch.rand(delta.shape, generator=draw) >= drop)
    return scale * total / (1 - drop if rescale else 1)


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Marczak et al. 2024, arXiv:2407.06322, sec. 4",
    search={"scale": (0.0, 2.0)},
    order="of two experts that moved an entry equally far the later one counts",
)
def magmax(tensor: Slice, *, scale: float = 0.5) -> Tensor:
    """Take each entry from the expert that moved it most.

    step_p = scale * tau_{t*p},  t* = argmax_t |tau_tp|, the later expert where two are equal

    Args:
        tensor: deltas (T, *s).
        scale: length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Marczak et al. 2024, arXiv:2407.06322, sec. 4 (MagMax).
    """
    check_scale(scale)
    largest = tensor.deltas[0]
    for delta in tensor.deltas[1:]:
        largest = torch.where(delta.abs() >= largest.abs(), delta, largest)
    return scale * largest


def magnitude_thresholds(pairs: Pairs, *, density: float) -> Tensor:
    """Return per expert the (d - floor(d * density))-th smallest |tau|, exactly, (T,) in float64.

    Two passes, whatever the size: count the magnitudes by the upper half of their float32 bit
    pattern, which orders like the magnitude; then collect the one bin that holds the threshold.
    """
    _check_density(density)
    counts: Tensor | None = None
    for _, deltas in pairs:
        bins = _bins(deltas)  # (T, n)
        rows = torch.stack([row.bincount(minlength=1 << 16) for row in bins])
        counts = rows if counts is None else counts + rows
    if counts is None:
        return torch.zeros(0, dtype=torch.float64)
    entries = int(counts[0].sum())
    rank = entries - int(entries * density)  # from 1; 0 keeps everything
    below = counts.cumsum(dim=1)
    bin_of = torch.searchsorted(below, torch.full((len(below), 1), max(rank, 1)))[:, 0]
    inside = _collect(pairs, bin_of)
    return torch.stack(
        [
            _smallest(values, rank - int(below[t, bin_of[t]] - counts[t, bin_of[t]]))
            for t, values in enumerate(inside)
        ]
    )


def _bins(deltas: Tensor) -> Tensor:
    """Return the upper 16 bits of each |tau| in float32, (T, n) as integers."""
    pattern = _rows(deltas).float().contiguous().view(torch.int32)
    return (pattern >> 16).long()


def _rows(deltas: Tensor) -> Tensor:
    """Return |tau|, one row an expert, (T, n), whatever the tensor's own shape."""
    return deltas.abs().reshape(len(deltas), deltas[0].numel())


def _collect(pairs: Pairs, bin_of: Tensor) -> list[Tensor]:
    """Return for each expert the magnitudes that fall into its bin, in float64."""
    found: list[list[Tensor]] = [[] for _ in bin_of]
    for _, deltas in pairs:
        inside = _bins(deltas) == bin_of[:, None]
        magnitudes = _rows(deltas).double()
        for t, row in enumerate(inside):
            found[t].append(magnitudes[t, row])
    return [torch.cat(values) for values in found]


def _smallest(values: Tensor, rank: int) -> Tensor:
    """Return the rank-th smallest value, from 1; 0 where everything is kept."""
    return values.kthvalue(rank).values if rank > 0 else torch.zeros((), dtype=values.dtype)


def _trimmed(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Return the deltas with entries below their expert's threshold set to 0, (T, *s)."""
    column = thresholds.reshape(-1, *[1] * (deltas.ndim - 1))
    return deltas * (deltas.abs() >= column)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"`density` must lie in (0, 1], but is {density!r}.")
