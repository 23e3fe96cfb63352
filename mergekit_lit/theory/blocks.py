"""This file cuts a model into blocks of parameters whose coefficients are the same."""

from collections.abc import Mapping, Sequence

from mergekit_lit.core.experts import Experts
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.norms import squared_norm


def layer_groups(experts: Experts) -> dict[str, list[str]]:
    """Return the names of the tensors that merging moves, by layer group, in a fixed order."""
    groups: dict[str, list[str]] = {}
    for name in experts.merged_names():
        groups.setdefault(experts.structure[name].group, []).append(name)
    return groups


def blocks_of(experts: Experts, rows: Mapping[str, Sequence[float]]) -> list[Block]:
    """Return the blocks of a merge: the layer groups, or tensors where these differ in a group.

    Args:
        experts: T experts.
        rows: lambda (T,) of each tensor that merging moves, by name.
    """
    groups = layer_groups(experts)
    if any(list(rows[name]) != list(rows[names[0]]) for names in groups.values() for name in names):
        groups = {name: [name] for names in groups.values() for name in names}
    parts = moved_parts(experts, groups)
    return [
        Block(group, tuple(rows[names[0]]), parts[group], tuple(names))
        for group, names in groups.items()
    ]


def moved_parts(
    experts: Experts, groups: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, ...]]:
    """Return m_i^l = ||tau_i^l||^2 / ||tau_i||^2 of each expert by group, which sums to 1.

    An expert that did not move counts as if it had moved alike in every group.
    """
    squares = {
        group: [
            float(squared_norm([experts.delta(name, t) for name in names]))
            for t in range(len(experts))
        ]
        for group, names in groups.items()
    }
    totals = [sum(each) for each in zip(*squares.values(), strict=True)]
    return {
        group: tuple(
            square / total if total else 1 / len(groups)
            for square, total in zip(row, totals, strict=True)
        )
        for group, row in squares.items()
    }
