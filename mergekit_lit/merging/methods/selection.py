"""This file is the methods that compare entries between experts: SCE, PCB, RAM, Nearswap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_interval, check_scale
from mergekit_lit.merging.methods.sparsify import agreeing
from mergekit_lit.merging.quantiles import Pairs, smallest
from mergekit_lit.merging.reductions import total
from mergekit_lit.merging.steps import weighted_sum

# PCB cuts off this share of the magnitudes at either end before it compares them.
_TAIL = 1e-4


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Wan et al. 2024, arXiv:2408.07990 (SCE of FuseChat 2.0)",
    search={"density": (0.05, 1.0), "scale": (0.0, 3.0)},
    homogeneous=True,
)
def sce(tensor: Slice, *, density: float = 0.1, scale: float = 1.0) -> Tensor:
    """Select entries on which the experts differ, weigh experts by energy, erase minority signs.

    m_p = [variance_t(tau_tp) among the largest],  w_t = mean_p (m_p tau_tp)^2 / sum over experts,
    e_tp = [sign(tau_tp) = sign(sum_s m_p tau_sp)],  step_p = scale * sum_t w_t e_tp m_p tau_tp /
    sum_t w_t e_tp

    Args:
        tensor: deltas (T, *s).
        density: share of the tensor's entries with a variance above 0 that is kept, in (0, 1]; 1
            selects nothing.
        scale: length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Wan et al. 2024, arXiv:2408.07990 (FuseChat 2.0: select, calculate, erase).
    Differs: at least one entry of a tensor is kept, and all that vary as much as the last one; one
        expert comes back whole.
    """
    check_interval("density", density, "(0, 1]")
    check_scale(scale)
    kept = tensor.deltas * _varying(tensor.deltas, density)
    energy = torch.stack([total(delta.double().square()) for delta in kept])
    if not bool(energy.any()):
        return torch.zeros_like(kept[0])
    weights = energy / energy.sum()
    majority = agreeing(kept, kept.sum(dim=0).sign())
    mass = weighted_sum(weights, (majority != 0).to(kept.dtype))
    step = weighted_sum(weights, majority)
    return scale * torch.where(mass > 0, step / torch.where(mass > 0, mass, 1), 0)


def competition(pairs: Pairs, *, density: Sequence[float]) -> list[dict[str, Any]]:
    """Find for each density what PCB needs of the whole model, per expert.

    Returns:
        `balance`, which the bounds of |tau| make, one for all densities; and `span` (T, 2), the
        balance of the last winner and the largest.
    """
    for share in density:
        check_interval("density", share, "(0, 1]")

    def tails(entries: int) -> list[int]:
        cut = int(entries * _TAIL)
        return [cut + 1, entries - cut]

    def winners(entries: int) -> list[int]:
        return [*(max(1, entries - max(1, int(entries * share))) for share in density), entries]

    balance = Balance(smallest(pairs, torch.abs, tails))
    *lows, high = smallest(pairs, balance, winners).unbind(dim=1)
    return [{"balance": balance, "span": torch.stack([low, high], dim=1)} for low in lows]


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Du et al. 2024, arXiv:2410.02396 (PCB)",
    search={"density": (0.02, 0.5), "scale": (0.0, 3.0)},
    prepare=competition,
    together="density",
    elementwise=True,
    homogeneous=True,
)
def pcb(tensor: Slice, *, density: float = 0.1, scale: float = 1.2) -> Tensor:
    """Let entries compete within and between experts, and average the winners by their balance.

    n_t = ((|tau_t| - min) / (max - min))^2,  b_t = exp(T n_t) * tanh(tau_t sum_s tau_s),
    w_t = min-max normalised max(b_t, its (1 - density) quantile),
    step = scale * sum_t w_t tau_t / max(sum_t w_t, 1e-12)

    Args:
        tensor: deltas (T, *s), and the balance, whose min and max are over all entries of an
            expert, without the 0.01 % at either end.
        density: r, share of each task vector's entries that keeps a weight, in (0, 1].
        scale: lambda, length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Du et al. 2024, arXiv:2410.02396 (parameter competition balancing).
    Differs: one scale for all experts; the paper also evolves one for each on validation data.
        What is averaged is not clipped at the tails, where weights are.
    """
    check_interval("density", density, "(0, 1]")
    check_scale(scale)
    low, high = (_column(end, tensor.deltas) for end in tensor.stats["span"].T)
    width = high - low
    balance: Tensor = tensor.stats["balance"](tensor.deltas)
    weights = balance.clamp(min=low).sub_(low)
    weights /= torch.where(width > 0, width, 1)
    weights[(width <= 0).flatten()] = 1
    total_weight = weights.sum(dim=0).clamp_(min=1e-12)
    return weights.mul_(tensor.deltas).sum(dim=0).div_(total_weight).mul_(scale)


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Behavior Knowledge Merge in Reinforced Agentic Models, 2026, arXiv:2601.13572 (RAM)",
    search={"scale": (0.0, 2.0)},
    elementwise=True,
    homogeneous=True,
)
def ram(tensor: Slice, *, threshold: float = 1e-5, scale: float = 1.0) -> Tensor:
    """Keep what one expert alone moved, and average what several moved.

    a_tp = [|tau_tp| > threshold],  step_p = scale * sum_t a_tp tau_tp / max(1, sum_t a_tp)

    Args:
        tensor: deltas (T, *s).
        threshold: how far an expert must have moved an entry to count, in the units of the
            weights, >= 0.
        scale: length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Behavior Knowledge Merge in Reinforced Agentic Models, 2026, arXiv:2601.13572 (RAM).
    Differs: without the paper's rescaling of what one expert alone moved.
    """
    if threshold < 0:
        raise ValueError(f"`threshold` must be at least 0, but is {threshold!r}.")
    check_scale(scale)
    active = tensor.deltas.abs() > threshold
    step = (tensor.deltas * active).sum(dim=0) / active.sum(dim=0).clamp(min=1)
    return scale * step


@MERGE_METHODS.add(
    form="kernel",
    family="sparsifying",
    data="none",
    source="Goddard et al. 2024, arXiv:2403.13257 (Nearswap of mergekit 0.1)",
    # The reach is in the units of the weights: what is far depends on how far the experts went.
    search={"reach": (1e-3, 1e-2), "scale": (0.0, 8.0)},
    elementwise=True,
    homogeneous=True,
)
def nearswap(tensor: Slice, *, reach: float = 1e-3, scale: float = 1.0) -> Tensor:
    """Take each expert's entries where they lie near the base, and go towards them elsewhere.

    w_tp = min(1, reach / |tau_tp|),  step = scale * mean_t w_t tau_t

    Args:
        tensor: deltas (T, *s).
        reach: how far an entry is followed, in the units of the weights, >= 0.
        scale: length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Goddard et al. 2024, arXiv:2403.13257 (Nearswap of mergekit 0.1).
    Differs: the mean over any number of experts; there it is one.
    """
    if reach < 0:
        raise ValueError(f"`reach` must be at least 0, but is {reach!r}.")
    check_scale(scale)
    return scale * tensor.deltas.clamp(-reach, reach).mean(dim=0)


def _varying(deltas: Tensor, density: float) -> Tensor:
    """Return which entries vary most between the experts, (*s)."""
    variance = deltas.var(dim=0, correction=0)
    varying = int((variance > 0).sum())
    if density == 1 or varying == 0:
        return torch.ones_like(variance, dtype=torch.bool)
    kept = max(1, int(varying * density))
    return variance >= variance.reshape(-1).kthvalue(variance.numel() - kept + 1).values


class Balance:
    """The balance of deltas, (T, *s) -> (T, *s): b_t = exp(T n_t) * tanh(tau_t sum_s tau_s).

    It keeps what it made last, for which merges that differ in density ask one after another.
    """

    def __init__(self, bounds: Tensor) -> None:
        """Take the min and max of |tau_t| over the whole model, (T, 2)."""
        self._bounds = bounds
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, deltas: Tensor) -> Tensor:
        """Return the balance, which must not be changed."""
        last = self._last
        if last is None or last[0] is not deltas:
            last = self._last = deltas, self._made(deltas)
        return last[1]

    def _made(self, deltas: Tensor) -> Tensor:
        low, high = (_column(end, deltas) for end in self._bounds.T)
        width = high - low
        share = deltas.abs().clamp_(min=low, max=high).sub_(low)
        # Magnitudes that are all the same have shares of 0.
        share /= torch.where(width > 0, width, 1)
        within = share.square_().mul_(len(deltas)).exp_()
        return within.mul_((deltas * deltas.sum(dim=0)).tanh_())


def _column(values: Tensor, deltas: Tensor) -> Tensor:
    """Return one number per expert, (T,), so that it broadcasts to deltas (T, *s)."""
    return values.to(deltas.dtype).reshape(-1, *[1] * (deltas.ndim - 1))
