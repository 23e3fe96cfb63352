"""This file is the methods that keep a share of each delta's entries: TIES, Breadcrumbs, MagMax."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_interval, check_scale
from mergekit_lit.merging.quantiles import Pairs, smallest, threshold
from mergekit_lit.merging.steps import sum_of

Combine = Literal["mean", "sum"]


def trim_and_elect(
    pairs: Pairs, *, density: Sequence[float], trim: Literal["model", "tensor"] = "model"
) -> list[dict[str, Any]]:
    """Find for each density what TIES needs of the whole model: thresholds, and the majority sign.

    threshold_t = the (d - floor(d * density))-th smallest |tau_t| over all d entries, exactly.

    Returns:
        `thresholds` (T,), None where tensors are trimmed for themselves; and `majority`, a function
        that returns the sign of sum_p sign(sum_t m_tp tau_tp). It takes another pass over all
        entries, one for all densities, and is needed only where what is kept of an entry sums to 0
        exactly.
    """
    thresholds: Sequence[Tensor | None] = [None] * len(density)
    if trim == "model":
        thresholds = list(magnitude_thresholds(pairs, densities=density))

    @cache
    def majorities() -> list[int]:
        signs = [0] * len(density)
        for _, deltas in pairs:
            for d, (bounds, share) in enumerate(zip(thresholds, density, strict=True)):
                summed = _trimmed(deltas, bounds, share).sum(dim=0).numpy()
                signs[d] += int(np.count_nonzero(summed > 0) - np.count_nonzero(summed < 0))
        return [(sign > 0) - (sign < 0) for sign in signs]

    def majority(place: int) -> int:
        return majorities()[place]

    return [
        {"thresholds": bounds, "majority": partial(majority, place)}
        for place, bounds in enumerate(thresholds)
    ]


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Yadav et al. 2023, arXiv:2306.01708, alg. 1",
    search={"density": (0.05, 1.0), "scale": (0.0, 3.0)},
    prepare=trim_and_elect,
    together="density",
    elementwise=lambda config: config["trim"] == "model",
    homogeneous=True,
)
def ties(
    tensor: Slice,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    combine: Combine = "mean",
    trim: Literal["model", "tensor"] = "model",
) -> Tensor:
    """Keep the largest entries, elect a sign, combine what agrees.

    m_tp = [|tau_tp| >= threshold_t],  s_p = sign(sum_t m_tp tau_tp),
    step_p = scale * mean (or sum) over {t: sign(m_tp tau_tp) = s_p} of tau_tp

    Args:
        tensor: deltas (T, *s), and the thresholds of the whole model.
        density: share of each task vector's entries that is kept, in (0, 1].
        scale: length of the step, unitless, >= 0.
        combine: `mean` over the experts that agree, or their `sum`.
        trim: keep the largest entries of the whole `model`, or of each `tensor` as mergekit does.

    Returns:
        The step, (*s).

    Source: Yadav et al. 2023, arXiv:2306.01708, alg. 1; the threshold over all entries at once and
        the majority sign for exact ties are the published code's.
    Differs: `trim` by tensor and the `sum` of what agrees are mergekit's, and must be asked for.
    """
    check_interval("density", density, "(0, 1]")
    check_scale(scale)
    thresholds = tensor.stats["thresholds"] if trim == "model" else None

    def kept() -> Tensor:
        return _trimmed(tensor.deltas, thresholds, density)

    return scale * _elected(kept, tensor.stats["majority"], combine)


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Davari & Belilovsky 2023, arXiv:2312.06795 (Model Breadcrumbs)",
    search={"drop": (0.0, 0.95), "outliers": (0.0, 0.05), "scale": (0.0, 1.5)},
    homogeneous=True,
)
def breadcrumbs(
    tensor: Slice, *, drop: float = 0.85, outliers: float = 0.007, scale: float = 0.3
) -> Tensor:
    """Drop each tensor's smallest entries and its few largest, and sum the rest.

    m_tp = [low_t <= |tau_tp| <= high_t],  step = scale * sum_t m_t tau_t

    Args:
        tensor: deltas (T, *s).
        drop: beta, share of each delta's entries that is dropped as too small, in [0, 1].
        outliers: 1 - gamma, share that is dropped as too large, in [0, 1 - drop].
        scale: alpha, the weight of every task vector, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Davari & Belilovsky 2023, arXiv:2312.06795 (Model Breadcrumbs).
    Differs: entries as large as a bound are all kept; shares of less than one entry drop none.
    """
    check_interval("drop", drop, "[0, 1]")
    check_interval("outliers", outliers, "[0, 1]")
    check_scale(scale)
    if drop + outliers > 1:
        raise ValueError(
            f"`drop` + `outliers` must be at most 1, but are {drop!r} + {outliers!r}. Drop less."
        )
    kept = (delta * _between_shares(delta.abs(), drop, outliers) for delta in tensor.each)
    return scale * sum_of(kept)


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Marczak et al. 2024, arXiv:2407.06322, sec. 4",
    search={"scale": (0.0, 2.0)},
    order="of two experts that moved an entry equally far the later one counts",
    elementwise=True,
    homogeneous=True,
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
    Differs: experts start from one base each, where the paper also trains one after another.
    """
    check_scale(scale)
    largest = tensor.deltas[0]
    for delta in tensor.deltas[1:]:
        largest = torch.where(delta.abs() >= largest.abs(), delta, largest)
    return scale * largest


def magnitude_thresholds(pairs: Pairs, *, densities: Sequence[float]) -> Tensor:
    """Return per density and expert the (d - floor(d * density))-th smallest |tau|, exactly.

    It is 0 where every entry is kept; (D, T) in float64.
    """
    for density in densities:
        check_interval("density", density, "(0, 1]")
    found = smallest(
        pairs, torch.abs, lambda entries: [entries - int(entries * d) for d in densities]
    )
    return found.clamp(min=0).T


def _elected(kept: Callable[[], Tensor], majority: Callable[[], int], combine: Combine) -> Tensor:
    """Return what `combine` makes of the entries, (T, *s), of the sign of their sum, (*s).

    Where they sum to 0 exactly it is the majority's sign.
    """
    entries = kept()
    sign = entries.sum(dim=0).sign_()
    step = by_sign(entries, sign + (1 - sign.abs()), combine)
    # As if the majority were positive; a step is left only where something was kept.
    undecided = (1 - sign.abs()) * step
    if float(undecided.sum()) > 0 and majority() <= 0:
        tied = undecided != 0
        elected = torch.full_like(step[tied], majority())
        step[tied] = by_sign(kept()[:, tied], elected, combine)
    return step


def by_sign(kept: Tensor, sign: Tensor, combine: Combine) -> Tensor:
    """Return the sum over experts of the entries of a sign (*s), or their mean.

    Args:
        kept: the entries, (T, *s); written over.
        sign: 1 or -1; 0 gives 0.
        combine: what is returned.
    """
    # By products of numbers: comparisons that make booleans take ten times as long.
    agreed = kept.mul_(sign).clamp_(min=0)
    step = agreed.sum(dim=0).mul_(sign)
    return step if combine == "sum" else step.div_(agreed.sign_().sum(dim=0).clamp_(min=1))


def agreeing(kept: Tensor, sign: Tensor) -> Tensor:
    """Return the entries (T, *s) whose sign is the elected one (*s), and 0 for the others."""
    # By products of numbers: comparisons that make booleans take ten times as long.
    return (kept * sign).clamp(min=0) * sign


def _trimmed(deltas: Tensor, thresholds: Tensor | None, density: float) -> Tensor:
    """Return the deltas with entries below their expert's threshold set to 0, (T, *s).

    Without thresholds of the model, each tensor has its own.
    """
    if thresholds is None:
        thresholds = torch.stack([threshold(delta.abs(), density) for delta in deltas])
    # Hard shrinkage keeps what is larger than a bound; the threshold itself is to stay.
    bounds = thresholds.to(deltas.dtype)
    bounds = torch.nextafter(bounds, torch.zeros_like(bounds))
    kept = torch.empty_like(deltas)
    for row, delta, bound in zip(kept, deltas, bounds.tolist(), strict=True):
        torch.hardshrink(delta, bound, out=row)
    return kept


def _between_shares(magnitudes: Tensor, drop: float, outliers: float) -> Tensor:
    """Return which entries are none of the smallest share nor of the largest, (*s)."""
    count = magnitudes.numel()
    if count == 0:
        return magnitudes.bool()
    flat = magnitudes.reshape(-1)
    low = flat.kthvalue(min(int(count * drop) + 1, count)).values
    high = flat.kthvalue(max(count - int(count * outliers), 1)).values
    return (magnitudes >= low) & (magnitudes <= high)
