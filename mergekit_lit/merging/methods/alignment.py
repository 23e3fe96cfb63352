"""This file is alignment by weight matching: experts of different initialisations, unit to unit.

The units of a layer can change places without changing what the network computes. Two networks that
were initialised apart have theirs in different places, and their average is neither of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.permutations import (
    axis_layout,
    has_axes,
    permutation_sizes,
    permute_tensor,
    units_first,
)
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.specs import LazyParams
from mergekit_lit.core.structure import Structure

FEATURES = "features"
"""The permutation of the encoder's output, which the columns of every head follow."""

_NEED = "Alignment needs to know which units can change places"

# A new order must beat the old one by this share of its sum: a tie leaves every unit in its place.
_LEAST_GAIN = 1e-12

_SOURCE = "Ainsworth et al. 2022, arXiv:2209.04836, alg. 1"


def check_axes(experts: Experts) -> None:
    """Refuse experts whose structure names no permutations.

    Raises:
        ValueError: no tensor has a named axis.
    """
    if has_axes(experts.structure):
        return
    if not experts.backbone:
        raise ValueError(
            f"{_NEED}, but plain weights have no known architecture, which would tell. Merge them "
            "without it, or align experts of mergekit-lit."
        )
    raise ValueError(
        f"{_NEED}, but the structure of {experts.backbone!r} names none (those do of plain ViTs, "
        "and of ResNets whose stem is one convolution and whose blocks are basic or bottleneck "
        "ones without more). Merge experts of one base without it."
    )


def _check(experts: Experts, *, sweeps: int) -> None:
    if sweeps < 1:
        raise ValueError(f"`sweeps` must be at least 1, but is {sweeps}.")
    check_axes(experts)


@VENEERS.add(
    position="before", touches=("merged", "statistic", "head"), source=_SOURCE, check=_check
)
@MERGE_METHODS.add(
    form="experts",
    family="alignment",
    data="none",
    source=_SOURCE,
    order="the others are aligned to the first expert",
    check=_check,
)
def git_rebasin(
    experts: Experts,
    *,
    reference: Literal["first", "base"] = "first",
    sweeps: int = 100,
    seed: int = 0,
) -> Experts:
    """Permute the units of each expert to match those of a reference, weight by weight.

    P_t = argmax_P sum_s <theta_ref, P(theta_s)>, s of t's base;  theta_t <- P_t(theta_t)

    P_t(theta_t) computes the same function as theta_t, its units in another order; heads and
    BatchNorm statistics follow. As a method the aligned experts are averaged; as a veneer they go
    on to any other method. Experts of one base match one another best as they are: they move
    together, and stay where the reference is of their base. Experts of several bases want
    BatchNorm statistics that are recalibrated: those of one base suit none of them.

    Args:
        experts: T experts, of one base or of several of one architecture.
        reference: what the experts are aligned to: the `first` of them, or the `base`. Two trained
            networks match better than a trained and an untrained one, so the base should be a
            pretrained one.
        sweeps: most passes over all permutations of one expert, at least 1; few are needed.
        seed: of the order in which a sweep takes the permutations.

    Returns:
        The same experts with units in other places, each tensor permuted when it is asked for.

    Raises:
        ValueError: the structure names no permutations.

    Source: Ainsworth et al. 2022, arXiv:2209.04836, alg. 1 (weight matching).
    Differs: ViTs too, of which hidden units, whole attention heads and the residual stream permute;
        a permutation is solved again only after one that it depends on changed, to the same end;
        experts of one base, as far as their cards name it, share their permutations.
    """
    _check(experts, sweeps=sweeps)
    goal = experts.base if reference == "base" else experts.tuned[0]
    matched: list[dict[str, Tensor]] = [{} for _ in experts.tuned]
    for members in _by_base(experts):
        if reference == "first" and 0 in members:
            continue
        together = _mean([experts.tuned[t] for t in members])
        found = match_weights(goal, together, experts.structure, sweeps=sweeps, seed=seed)
        for t in members:
            matched[t] = found
    return permuted(experts, matched)


def match_weights(
    reference: Params, params: Params, structure: Structure, *, sweeps: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """Return the permutations of `params` that bring them closest to `reference`.

    Coordinate ascent on <reference, P(params)>: all but one permutation fixed, the best one is a
    linear assignment, P_k = argmax_P sum_i A[i, P(i)], with A the inner products of the units of
    both over all tensors that P_k acts on. It ends in a local optimum.

    Args:
        reference: tensors, by name.
        params: tensors of the same names and shapes.
        structure: which permutation acts on which axis.
        sweeps: most passes over all permutations.
        seed: of the order within a sweep.

    Returns:
        For each permutation an int64 tensor (units,), as `core.permutations.permute` takes it:
        unit i of the reference is like unit P[i] of `params`.
    """
    left, right = (_matched_tensors(p, structure) for p in (reference, params))
    sizes = permutation_sizes(left, structure)
    places = _places(left, structure)
    found = {key: torch.arange(size) for key, size in sizes.items()}
    stale = set(sizes)
    for sweep in range(sweeps):
        order = torch.randperm(len(sizes), generator=generator(seed, "git_rebasin", sweep))
        for key in [list(sizes)[i] for i in order]:
            if key not in stale:
                continue
            stale.discard(key)
            gains = _gains(key, left, right, places[key], structure, found)
            better = _best_order(gains, found[key])
            if better is not None:
                found[key] = better
                stale |= _neighbours(places[key], structure) - {key}
        if not stale:
            break
    return found


def permuted(experts: Experts, permutations: Sequence[Mapping[str, Tensor]]) -> Experts:
    """Return experts with units in another order, each with its permutations by name.

    Backbone, BatchNorm statistics and head follow; what each expert computes stays as it is.
    """
    tuned = [
        _Permuted(params, experts.structure, mine) if mine else params
        for params, mine in zip(experts.tuned, permutations, strict=True)
    ]
    heads = [
        _permuted_head(head, mine) for head, mine in zip(experts.heads, permutations, strict=True)
    ]
    return replace(experts, tuned=tuned, heads=heads)


def _by_base(experts: Experts) -> list[list[int]]:
    """Return the places of the experts of each base; one whose card names none is alone."""
    found: dict[str | int, list[int]] = {}
    for t, card in enumerate(experts.cards):
        found.setdefault(card.base_hash or t, []).append(t)
    return list(found.values())


def _mean(tuned: Sequence[Params]) -> Params:
    """Return the mean of several sets of tensors, of which units match as those of their sum do."""
    if len(tuned) == 1:
        return tuned[0]
    return {
        name: torch.stack([params[name].double() for params in tuned]).mean(dim=0)
        for name in tuned[0]
    }


class _Permuted(LazyParams):
    """Tensors of one expert, each permuted when it is asked for."""

    def __init__(
        self, params: Params, structure: Structure, permutations: Mapping[str, Tensor]
    ) -> None:
        super().__init__(params)
        self._params, self._structure, self._permutations = params, structure, permutations

    def __getitem__(self, name: str) -> Tensor:
        return permute_tensor(self._params[name], self._structure[name].axes, self._permutations)


def _permuted_head(head: Params, permutations: Mapping[str, Tensor]) -> Params:
    """Return a head whose columns follow the features."""
    if FEATURES not in permutations or "weight" not in head:
        return head
    return {**head, "weight": head["weight"].index_select(1, permutations[FEATURES])}


def _matched_tensors(params: Params, structure: Structure) -> dict[str, Tensor]:
    """Return the tensors that are compared, in float64: weights, no statistics."""
    return {
        name: params[name].double()
        for name in sorted(params)
        if structure[name].is_merged and any(structure[name].axes)
    }


def _places(params: Params, structure: Structure) -> dict[str, list[tuple[str, int]]]:
    """Return for each permutation the tensors, and their axes, on which it acts."""
    places: dict[str, list[tuple[str, int]]] = {}
    for name in params:
        for dim, axis in enumerate(structure[name].axes):
            if axis is not None:
                places.setdefault(axis_layout(axis)[1], []).append((name, dim))
    return places


def _neighbours(places: Sequence[tuple[str, int]], structure: Structure) -> set[str]:
    """Return the permutations that share a tensor with the one that acts on these places."""
    axes = [axis for name, _ in places for axis in structure[name].axes if axis is not None]
    return {axis_layout(axis)[1] for axis in axes}


def _gains(
    key: str,
    left: Params,
    right: Params,
    places: Sequence[tuple[str, int]],
    structure: Structure,
    found: Mapping[str, Tensor],
) -> Tensor:
    """Return the inner products of every unit on the left with every one on the right, (n, n)."""
    others = {name: permutation for name, permutation in found.items() if name != key}
    gains = torch.zeros(len(found[key]), len(found[key]), dtype=torch.float64)
    for name, dim in places:
        axes = structure[name].axes
        axis = str(axes[dim])
        moved = permute_tensor(right[name], axes, others)
        gains += units_first(left[name], dim, axis) @ units_first(moved, dim, axis).T
    return gains


def _best_order(gains: Tensor, order: Tensor) -> Tensor | None:
    """Return the order of the largest sum of gains, or None where none beats the present one."""
    # Imported here: it takes half a second that no other method should pay.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    best = torch.from_numpy(columns).to(torch.int64)
    rows = torch.arange(len(best))
    gain = gains[rows, best].sum() - gains[rows, order].sum()
    return best if bool(gain > _LEAST_GAIN * gains.abs().max() * len(best)) else None
