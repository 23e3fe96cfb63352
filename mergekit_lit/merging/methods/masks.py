"""This file is the methods that mask one multi-task step: consensus, TALL masks, EMR.

TALL masks and EMR leave each task a mask of its own (one bit an entry), so that every task has its
own model: `Merged.for_task`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_scale
from mergekit_lit.merging.passes import blockwise
from mergekit_lit.merging.reductions import total
from mergekit_lit.merging.steps import moved


@MERGE_METHODS.add(
    form="kernel",
    family="masks",
    data="none",
    source="Wang et al. 2024, arXiv:2405.07813 (Consensus)",
    search={"threshold": (0.2, 0.6), "scale": (0.0, 1.5)},
    elementwise=True,
    homogeneous=True,
)
def consensus(
    tensor: Slice, *, threshold: float = 0.4, agreement: int = 2, scale: float = 0.3
) -> Tensor:
    """Keep the entries of the summed step that matter to several tasks.

    tau = sum_t tau_t,  m_tp = [|tau_tp| >= threshold * |tau_p - tau_tp|],
    step_p = scale * [sum_t m_tp >= agreement] * tau_p

    Args:
        tensor: deltas (T, *s).
        threshold: how large an expert's entry must be beside the rest of the sum to matter to its
            task, >= 0.
        agreement: number of tasks that an entry must matter to, from 0 (which keeps all, as task
            arithmetic does); at most T is asked for.
        scale: lambda, length of the step, unitless, >= 0.

    Returns:
        The step, (*s).

    Source: Wang et al. 2024, arXiv:2405.07813 (Consensus Merging of TALL masks).
    Differs: one threshold for all tasks; the paper chooses one for each on validation data.
    """
    _check_threshold(threshold)
    check_scale(scale)
    if agreement < 0:
        raise ValueError(f"`agreement` must be at least 0, but is {agreement!r}.")
    step = tensor.deltas.sum(dim=0)
    votes = _matters(tensor.deltas, threshold).sum(dim=0)
    return scale * step * (votes >= min(agreement, len(tensor.deltas)))


@MERGE_METHODS.add(
    form="whole",
    family="masks",
    data="none",
    source="Wang et al. 2024, arXiv:2405.07813 (TALL masks)",
    search={"threshold": (0.2, 0.6)},
    per_task=True,
    check=lambda _, threshold: _check_threshold(threshold),
)
def tall_masks(experts: Experts, *, threshold: float = 0.4) -> Merged:
    """Give each task the entries of the summed step that matter to it.

    tau = sum_t tau_t,  m_tp = [|tau_tp| >= threshold * |tau_p - tau_tp|],
    theta_t = theta_0 + m_t * tau

    Args:
        experts: T experts of one base.
        threshold: how large an expert's entry must be beside the rest of the sum to matter to its
            task, >= 0.

    Returns:
        theta_0 + tau, and a mask for each task.

    Source: Wang et al. 2024, arXiv:2405.07813 (TALL masks).
    Differs: one threshold for all tasks; the paper chooses one for each on validation data.
    """
    _check_threshold(threshold)
    return _masked(
        experts,
        step=lambda deltas: deltas.sum(dim=0),
        mask=lambda deltas: _matters(deltas, threshold),
    )


@MERGE_METHODS.add(
    form="whole",
    family="masks",
    data="none",
    source="Huang et al. 2024, arXiv:2405.17461 (EMR)",
    per_task=True,
)
def emr(experts: Experts) -> Merged:
    """Elect one step, and give each task the entries of its own sign, rescaled.

    s_p = sign(sum_t tau_tp),  tau_p = s_p max_t {|tau_tp| : sign(tau_tp) = s_p},
    m_tp = [tau_tp s_p > 0],  c_t = sum_p |tau_tp| / sum_p m_tp |tau_p|,
    theta_t = theta_0 + c_t m_t * tau

    Args:
        experts: T experts of one base.

    Returns:
        theta_0 + tau, and a mask and a scale for each task.

    Source: Huang et al. 2024, arXiv:2405.17461 (elect, mask, rescale).
    Differs: c_t is of all entries alike, as in the paper; the published code takes sums of means.
    """
    own, elected = [0.0] * len(experts), [0.0] * len(experts)

    def step(deltas: Tensor) -> Tensor:
        sign = _elected_sign(deltas)
        largest = (deltas * sign).amax(dim=0).clamp(min=0)
        for t, delta in enumerate(deltas):
            own[t] += float(total(delta.abs()))
            elected[t] += float(total(largest * (delta * sign > 0)))
        return sign * largest

    merged = _masked(experts, step=step, mask=lambda deltas: deltas * _elected_sign(deltas) > 0)
    scales = {
        task: own[t] / elected[t] if elected[t] > 0 else 1.0 for t, task in enumerate(experts.names)
    }
    return Merged(
        merged.shared, merged.structure, masks=merged.masks, base=merged.base, scales=scales
    )


def _masked(
    experts: Experts, *, step: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]
) -> Merged:
    """Return theta_0 + step(deltas), and of each task mask(deltas)[t], block by block."""
    steps: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {task: {} for task in experts.names}
    for name in experts.merged_names():
        base = experts.base[name]
        votes = torch.empty(len(experts), base.numel(), dtype=torch.bool)

        def part(deltas: Tensor, start: int, votes: Tensor = votes) -> Tensor:
            votes[:, start : start + deltas.shape[1]] = mask(deltas)
            return step(deltas)

        (steps[name],) = blockwise(experts, name, [part])
        for task, own in zip(experts.names, votes, strict=True):
            masks[task][name] = own.reshape(base.shape)
    return Merged(
        shared=moved(experts.base, steps.items()),
        structure=experts.structure,
        masks=masks,
        base={name: experts.base[name] for name in steps},
    )


def _matters(deltas: Tensor, threshold: float) -> Tensor:
    """Return which entries matter to which task, (T, *s)."""
    return deltas.abs() >= threshold * (deltas.sum(dim=0) - deltas).abs()


def _elected_sign(deltas: Tensor) -> Tensor:
    """Return the sign of the sum, (*s); -1 where it is 0."""
    return torch.where(deltas.sum(dim=0) > 0, 1.0, -1.0).to(deltas.dtype)


def _check_threshold(threshold: float) -> None:
    if threshold < 0:
        raise ValueError(f"`threshold` must be at least 0, but is {threshold!r}.")
