"""This file is the methods that drop entries at random: DARE, and DELLA by magnitude.

The draws of a block of an expert's tensor depend on seed, tensor name, the expert's place and the
block's alone.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.merging.configuration import check_interval, check_scale
from mergekit_lit.merging.methods.sparsify import Combine, by_sign
from mergekit_lit.merging.reductions import total
from mergekit_lit.merging.steps import sum_of

Rescale = Literal["expected", "l1", "none"]
"""What happens to the entries kept: divided by the probability of keeping them; multiplied so that
the delta's L1 norm stays, as mergekit does; or nothing."""

Rule = Literal["linear", "ties"]
"""What is combined of the entries kept: all of them, or those of the elected sign."""


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Yu et al. 2024, arXiv:2311.03099, eq. 3",
    search={"drop": (0.0, 0.99), "scale": (0.0, 1.5)},
    order="an expert's draws are keyed by its place among the experts",
    elementwise=lambda config: config["rescale"] != "l1",
    homogeneous=True,
)
def dare(
    tensor: Slice,
    *,
    drop: float = 0.5,
    scale: float = 0.3,
    rescale: Rescale = "expected",
    rule: Rule = "linear",
    combine: Combine = "sum",
) -> Tensor:
    """Drop entries at random, rescale the others, and sum.

    m_tp ~ Bernoulli(1 - drop),  step = scale * sum_t m_t tau_t / (1 - drop)

    Args:
        tensor: deltas (T, *s); the draws depend on seed, tensor name and expert alone.
        drop: share of the entries that is dropped, in [0, 1).
        scale: lambda, the weight of every task vector, unitless, >= 0; with `mean` about 1.
        rescale: `expected` divides by 1 - drop, so that the mean of every entry stays; `l1` keeps
            each tensor's L1 norm, as mergekit does; `none`.
        rule: combine all entries kept (`linear`), or those of the sign that `ties` would elect.
        combine: the `sum` of those entries, or their `mean`.

    Returns:
        The step, (*s).

    Source: Yu et al. 2024, arXiv:2311.03099, eq. 3, followed by task arithmetic or by the sign
        election of Yadav et al. 2023, arXiv:2306.01708, without its trimming.
    Differs: where the entries kept cancel exactly, no sign is elected and the step is 0.
    """
    check_interval("drop", drop, "[0, 1)")
    check_scale(scale)
    kept = _dropped(tensor, drop, 0.0, rescale)
    return scale * _joined(kept, len(tensor.each), rule, combine)


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Deep et al. 2024, arXiv:2406.11617 (DELLA)",
    search={"drop": (0.1, 0.85), "window": (0.0, 0.9), "scale": (0.0, 3.0)},
    order="an expert's draws are keyed by its place among the experts",
    homogeneous=True,
)
def della(
    tensor: Slice,
    *,
    drop: float = 0.5,
    window: float = 0.2,
    scale: float = 1.0,
    rescale: Rescale = "expected",
    rule: Rule = "ties",
    combine: Combine = "mean",
) -> Tensor:
    """Drop small entries more often than large ones, rescale, elect a sign, average what agrees.

    p_tp = drop + window / 2 - window * rank_tp / n,  m_tp ~ Bernoulli(1 - p_tp),
    step = scale * elect_and_average(m_t tau_t / (1 - p_t))

    Args:
        tensor: deltas (T, *s); ranks go from 0 (smallest magnitude) to n - 1 within a row of the
            matrix, or within a tensor of fewer than 2 axes.
        drop: p, mean share of the entries that is dropped; drop -+ window / 2 must lie in [0, 1).
        window: epsilon, how much likelier the smallest entry is dropped than the largest, >= 0.
        scale: lambda, length of the step, unitless, >= 0.
        rescale: `expected` divides by 1 - p_tp, so that the mean of every entry stays; `l1` keeps
            each tensor's L1 norm, as mergekit does; `none`.
        rule: combine all entries kept (`linear`), or those of the sign that `ties` would elect.
        combine: the `sum` of those entries, or their `mean`.

    Returns:
        The step, (*s).

    Source: Deep et al. 2024, arXiv:2406.11617 (MAGPRUNE, elect, fuse). mergekit's variant
        is rescale `l1`, with a window of twice its epsilon.
    Differs: convolutions are matrices (C_out, C_in * kh * kw); where the entries kept cancel
        exactly, no sign is elected and the step is 0.
    """
    check_interval("window", window, "[0, 1]")
    if not (drop - window / 2 >= 0 and drop + window / 2 < 1):
        raise ValueError(
            f"`drop` must lie in [window / 2, 1 - window / 2), but is {drop!r} with a window of "
            f"{window!r}."
        )
    check_scale(scale)
    kept = _dropped(tensor, drop, window, rescale)
    return scale * _joined(kept, len(tensor.each), rule, combine)


def _dropped(tensor: Slice, drop: float, window: float, rescale: Rescale) -> Iterator[Tensor]:
    """Yield each delta with dropped entries set to 0 and the others rescaled, (*s)."""
    for expert, delta in enumerate(tensor.each):
        probability = drop + (window / 2 - window * _rank_shares(delta) if window else 0.0)
        key = derive_seed(tensor.seed, tensor.name, expert)
        stays = drawn(delta.shape, probability, key=key, offset=tensor.offset)
        kept = torch.empty_like(delta, memory_format=torch.contiguous_format)
        # NumPy multiplies by booleans six times as fast as torch.
        np.multiply(delta.numpy(), stays, out=kept.numpy())
        yield _rescaled(kept, delta, 1 - probability, rescale)


def drawn(
    shape: Sequence[int], probability: float | Tensor, *, key: int, offset: int = 0
) -> np.ndarray:
    """Return for each entry whether it stays: false with its probability, independently.

    The generator is a counter's (Salmon et al. 2011, Philox 4x64): the draw of an entry depends on
    the key and on the entry's place alone, whatever the blocks are.

    Args:
        shape: of the entries.
        probability: of being dropped, in [0, 1), resolved to 2^-32; one number, or one an entry.
        key: of the tensor and expert.
        offset: place of the first entry, a multiple of 8: a count gives eight draws.
    """
    count = math.prod(shape)
    words = -(-count // 2)
    # Merges that differ in `drop` ask for the same draws, block by block.
    draw = _kept_words if words <= _BLOCK_WORDS else _words
    draws = draw(key, offset // 8, words).view("<u4")[:count].reshape(shape)
    if isinstance(probability, Tensor):
        return draws >= probability.double().numpy() * 2**32
    return draws >= math.ceil(probability * 2**32)


def _words(key: int, counter: int, count: int) -> np.ndarray:
    """Return random words of 64 bits, (count,)."""
    words: np.ndarray = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words.astype("<u8", copy=False)


# A block of each of 32 experts: 8 MB at most.
_BLOCK_WORDS = 32_768
_kept_words = lru_cache(maxsize=32)(_words)


def _rescaled(rest: Tensor, delta: Tensor, keep: Tensor | float, rescale: Rescale) -> Tensor:
    """Rescale what is left of a delta, in place."""
    if rescale == "expected":
        return rest.div_(keep)
    if rescale == "l1":
        left = float(total(rest.abs()))
        return rest.mul_(float(total(delta.abs())) / left if left > 0 else 1.0)
    return rest


def _rank_shares(delta: Tensor) -> Tensor:
    """Return each entry's rank by magnitude in its row, from 0, over the row's length, (*s)."""
    rows = delta.abs().flatten(1) if delta.ndim > 1 else delta.abs().reshape(1, -1)
    order = rows.argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1]).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return (ranks.to(delta.dtype) / max(rows.shape[1], 1)).reshape(delta.shape)


def _joined(kept: Iterator[Tensor], count: int, rule: Rule, combine: Combine) -> Tensor:
    """Return the step of the entries kept of each of `count` experts, (*s)."""
    if rule == "ties":
        parts = torch.stack(list(kept))
        return by_sign(parts, parts.sum(dim=0).sign_(), combine)
    return sum_of(kept) / (1 if combine == "sum" else count)
