"""This file is the features of deltas: how experts disagree, and what of each a merge keeps."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.search.predicting.columns import (
    Column,
    Row,
    log10,
    number,
    spread,
    spread_columns,
)
from mergekit_lit.theory.geometry import (
    DeltaSums,
    StepSums,
    delta_sums,
    leading_subspace,
    mean_over_pairs,
    pairs_of,
    step_sums,
    subspace_overlap,
)
from mergekit_lit.theory.norms import squared_norm

RANK = 8
"""Leading singular directions of a task matrix that overlaps are taken of."""

_OTHERS, _LAYERS, _TASKS = "the other experts", "the layer groups", "the tasks"
_MATRICES = ("linear", "convolution")

COLUMNS: tuple[Column, ...] = (
    Column("log_relative_norm", "log10 of ||tau|| / ||x0||"),
    *spread_columns("cosine", "cosine of the expert's delta with another's", _OTHERS),
    *spread_columns("layer_cosine", "mean cosine with the others in a layer group", _LAYERS),
    *spread_columns("conflict", "sign conflict with another expert", _OTHERS),
    *spread_columns("layer_conflict", "mean sign conflict in a layer group", _LAYERS),
    *spread_columns(
        "overlap",
        f"overlap of the {RANK} leading directions with another's, mean of the matrices",
        _OTHERS,
    ),
    Column("leading_share", f"share of ||tau||^2 in the {RANK} leading directions, mean of them"),
    Column("group_cosine", "mean cosine over the pairs of the group"),
    Column("group_conflict", "mean sign conflict over the pairs of the group"),
    Column("group_overlap", "mean overlap over the pairs of the group"),
    Column("cancellation", "share of all movement that the sum of the deltas loses"),
    *spread_columns("layer_cancellation", "the same in a layer group", _LAYERS),
    Column("log_step", "log10 of the length of the merge's step"),
    Column("step_ratio", "||step|| / ||tau||"),
    Column("survival", "<step, tau> / ||tau||^2, what the step keeps of the expert's delta"),
    Column("interference", "||step - survival tau|| / ||tau||, what else it carries"),
    *spread_columns("layer_survival", "survival in a layer group", _LAYERS),
    *spread_columns("layer_interference", "interference in a layer group", _LAYERS),
    *spread_columns("group_survival", "survival of a task's delta", _TASKS),
    *spread_columns("group_interference", "interference with a task's delta", _TASKS),
)


@dataclass(frozen=True)
class Angles:
    """How the deltas of one group lie to one another.

    Attributes:
        layers: sums by layer group.
        total: of all of them.
        overlap: of the leading directions of each pair, mean of the matrices, (T, T).
        shares: of ||tau||^2 in these directions, mean of the matrices, (T,).
        base_norm: ||x0||.
    """

    layers: Mapping[str, DeltaSums]
    total: DeltaSums
    overlap: Tensor
    shares: tuple[float, ...]
    base_norm: float


def angles_of(experts: Experts) -> Angles:
    """Return the angles of a group, once for all of its merges."""
    layers = delta_sums(_deltas(experts), _groups(experts))
    overlap, shares = _overlaps(experts)
    moving = [experts.base[name] for name in experts.merged_names()]
    return Angles(
        layers=layers,
        total=DeltaSums.total(layers.values(), len(experts)),
        overlap=overlap,
        shares=shares,
        base_norm=math.sqrt(float(squared_norm(moving))),
    )


def of_deltas(experts: Experts, angles: Angles) -> list[Row]:
    """Return how each expert's delta lies to the others, a row a task."""
    total, layers = angles.total, angles.layers.values()
    group = {
        "group_cosine": number(mean_over_pairs(total.cosine)),
        "group_conflict": number(mean_over_pairs(total.sign_conflict)),
        "group_overlap": number(mean_over_pairs(angles.overlap)),
        "cancellation": number(total.cancellation),
        **spread("layer_cancellation", [sums.cancellation for sums in layers]),
    }
    norms = total.norms.tolist()
    return [
        {
            "log_relative_norm": log10(norms[t] / angles.base_norm),
            **spread("cosine", pairs_of(total.cosine, t)),
            **spread("layer_cosine", [_mean(pairs_of(sums.cosine, t)) for sums in layers]),
            **spread("conflict", pairs_of(total.sign_conflict, t)),
            **spread("layer_conflict", [_mean(pairs_of(sums.sign_conflict, t)) for sums in layers]),
            **spread("overlap", pairs_of(angles.overlap, t)),
            "leading_share": number(angles.shares[t]),
            **group,
        }
        for t in range(len(experts))
    ]


def of_step(experts: Experts, merged: Merged) -> list[Row]:
    """Return what a merge's shared step keeps of each delta, a row a task."""
    layers = step_sums(_deltas(experts), step_of(experts, merged), _groups(experts))
    total = StepSums.total(layers.values(), len(experts))
    survival, interference = total.survival.tolist(), total.interference.tolist()
    group = {
        "log_step": log10(total.length),
        **spread("group_survival", survival),
        **spread("group_interference", interference),
    }
    norms = total.norms.tolist()
    return [
        {
            **group,
            "step_ratio": number(total.length / norms[t] if norms[t] else None),
            "survival": number(survival[t]),
            "interference": number(interference[t]),
            **spread("layer_survival", [float(sums.survival[t]) for sums in layers.values()]),
            **spread(
                "layer_interference", [float(sums.interference[t]) for sums in layers.values()]
            ),
        }
        for t in range(len(experts))
    ]


def step_of(experts: Experts, merged: Merged) -> dict[str, Tensor]:
    """Return x_avg - x0 of what merging moves, by name, in float32 or better."""
    return {
        name: merged.shared[name].float() - experts.base[name].float()
        for name in experts.merged_names()
    }


def _overlaps(experts: Experts) -> tuple[Tensor, tuple[float, ...]]:
    """Return overlaps (T, T) and shares (T,), means over the matrices of the layers."""
    count = len(experts)
    names = [name for name in experts.merged_names() if experts.structure[name].kind in _MATRICES]
    names = [name for name in names if experts.base[name].dim() > 1]
    overlap = torch.full((count, count), math.nan, dtype=torch.float64)
    if not names:
        return overlap, (math.nan,) * count
    spaces = [
        [leading_subspace(experts.delta(n, t), rank=RANK) for n in names] for t in range(count)
    ]
    for s, t in itertools.combinations(range(count), 2):
        pairs = zip(spaces[s], spaces[t], strict=True)
        overlap[s, t] = overlap[t, s] = _mean([subspace_overlap(*pair) for pair in pairs])
    shares = ([space.share for space in own if not math.isnan(space.share)] for own in spaces)
    return overlap, tuple(_mean(own) for own in shares)


def _deltas(experts: Experts) -> Iterator[tuple[str, Tensor]]:
    return ((name, experts.deltas(name)) for name in experts.merged_names())


def _groups(experts: Experts) -> dict[str, str]:
    return {name: experts.structure[name].group for name in experts.merged_names()}


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
