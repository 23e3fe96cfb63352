"""This file is veneers: what acts on the experts before any merge, or on its result after it.

A veneer is registered with its position. `before`: f(experts, *, config) -> Experts, whose deltas
the method gets. `after`: f(experts, merged, *, config) -> Merged. One whose time grows with the
number of entries alone declares `elementwise`, and one that acts on more than the tensors that are
merged declares the fates (`merging.plan.Fate`) of what it `touches`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params, add, subtract
from mergekit_lit.core.registry import VENEERS
from mergekit_lit.core.specs import LazyParams
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.merging.methods.arithmetic import depth_scales
from mergekit_lit.merging.passes import reduced, squared_lengths
from mergekit_lit.merging.reductions import total


@VENEERS.add(
    position="before",
    elementwise=True,
    source="after Yoshida et al. 2025, arXiv:2508.01148 (DisTaC)",
)
def equal_norms(
    experts: Experts,
    *,
    to: Literal["min", "median", "mean"] = "mean",
    scope: Literal["model", "tensor"] = "model",
) -> Experts:
    """Rescale the experts' deltas to one length before they are merged.

    tau_t <- tau_t * r / ||tau_t||,  r = min, median or mean of ||tau_1|| ... ||tau_T||

    Experts that moved much further than the others drown them in most methods.

    Args:
        experts: T experts of one base.
        to: which of their lengths all of them get.
        scope: lengths of whole `model` deltas, or of each `tensor` for itself.

    Returns:
        The same experts with other deltas, each read and rescaled when it is asked for; an expert
        that did not move stays.

    Source: after Yoshida et al. 2025, arXiv:2508.01148 (DisTaC).
    Differs: only the rescaling of its first step; DisTaC then distils what the shrunk ones lost.
    """
    names = experts.merged_names()
    squares = {name: squared_lengths(experts, name) for name in names}
    if scope == "model":
        whole = sum(squares.values(), torch.zeros(len(experts), dtype=torch.float64))
        squares = dict.fromkeys(names, whole)
    factors = {name: _factors(square.sqrt(), to) for name, square in squares.items()}
    tuned = [
        _Rescaled(experts.base, params, {name: float(factors[name][t]) for name in names})
        for t, params in enumerate(experts.tuned)
    ]
    return replace(experts, tuned=tuned)


@VENEERS.add(
    position="after",
    elementwise=True,
    source="Wang et al. 2024, arXiv:2410.17146 (LiNeS)",
)
def lines(
    experts: Experts, merged: Merged, *, alpha: float | None = None, beta: float | None = None
) -> Merged:
    """Scale the merged step by depth: the first blocks keep less of it than the last.

    theta^l = theta_0^l + (alpha + beta l / (L - 1)) (theta_merged^l - theta_0^l)

    Args:
        experts: T experts of one base.
        merged: the result of any method.
        alpha: scale in the first block, and of tensors outside the blocks, >= 0. Null is
            ||sum_t tau_t||_1 / (T ||step||_1), which gives the step there the L1 length of the
            experts' average.
        beta: how much more the last block keeps, >= 0. Null is max(0, 1 - alpha), which leaves the
            last block as it is.

    Returns:
        The merged model with a scaled step; masks and scales of tasks stay.

    Source: Wang et al. 2024, arXiv:2410.17146 (LiNeS for multi-task merging).
    """
    alpha = _average_share(experts, merged) if alpha is None else alpha
    beta = max(0.0, 1 - alpha) if beta is None else beta
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0, but is {value!r}.")
    scales = depth_scales(experts.structure, alpha, beta)
    shared = dict(merged.shared)
    for name in experts.merged_names():
        scaled = {name: scales[name] * _step(experts, merged, name)}
        shared |= add({name: experts.base[name]}, scaled)
    return replace(merged, shared=shared)


class _Rescaled(LazyParams):
    """Tensors of one expert, moved to base + factor * delta when they are asked for."""

    def __init__(self, base: Params, tuned: Params, factors: Mapping[str, float]) -> None:
        super().__init__(tuned)
        self._base, self._tuned, self._factors = base, tuned, factors

    def __getitem__(self, name: str) -> Tensor:
        tuned, factor = self._tuned[name], self._factors.get(name, 1.0)
        if factor == 1:
            return tuned
        base = floats({name: self._base[name]})
        return add(base, subtract({name: tuned}, base), scale=factor)[name]


def _factors(lengths: Tensor, to: Literal["min", "median", "mean"]) -> Tensor:
    """Return what each delta is multiplied by, (T,); 1 for one that did not move."""
    goals = {"min": lengths.min(), "median": lengths.quantile(0.5), "mean": lengths.mean()}
    return torch.where(lengths > 0, goals[to] / torch.where(lengths > 0, lengths, 1), 1)


def _step(experts: Experts, merged: Merged, name: str) -> Tensor:
    """Return how far a merge has moved one tensor from the base, (*s)."""
    return subtract({name: merged.shared[name]}, {name: experts.base[name]})[name]


def _average_share(experts: Experts, merged: Merged) -> float:
    """Return ||sum_t tau_t||_1 / (T ||step||_1); 1 where the step is 0."""
    summed = sum(
        float(total(reduced(experts, name, lambda deltas: deltas.sum(dim=0).abs())))
        for name in experts.merged_names()
    )
    steps = (_step(experts, merged, name) for name in experts.merged_names())
    length = sum(float(total(step.abs())) for step in steps)
    return summed / (len(experts) * length) if length > 0 else 1.0
