"""This file is permutations of a model's units: how they act on the axes that a structure names."""

import math
from collections.abc import Mapping

from torch import Tensor

from mergekit_lit.core.params import Params
from mergekit_lit.core.structure import Structure


def has_axes(structure: Structure) -> bool:
    """Return whether the structure tells which axes permute: it does for ResNets and plain ViTs."""
    return any(axis is not None for info in structure.values() for axis in info.axes)


def permutation_sizes(params: Params, structure: Structure) -> dict[str, int]:
    """Return the number of units that each permutation moves, by its name, sorted.

    Raises:
        ValueError: two axes of one permutation differ in their number of units.
    """
    sizes: dict[str, int] = {}
    for name in sorted(params):
        for axis, length in zip(structure[name].axes, params[name].shape, strict=False):
            if axis is None:
                continue
            before, key, after = axis_layout(axis)
            size = length // (before * after)
            if size * before * after != length or sizes.setdefault(key, size) != size:
                raise ValueError(
                    f"Axis {axis!r} of {name!r} must have {before} x {sizes.get(key)} x {after} "
                    f"entries, but has {length}."
                )
    return dict(sorted(sizes.items()))


def axis_layout(axis: str) -> tuple[int, str, int]:
    """Return the factors of an axis, slowest first: `3*heads*32` is 3 x heads x 32.

    Returns:
        Factor before, the permutation's name, factor after; absent factors are 1.
    """
    parts = axis.split("*")
    at = next(i for i, part in enumerate(parts) if not part.isdecimal())
    return math.prod(map(int, parts[:at])), parts[at], math.prod(map(int, parts[at + 1 :]))


def permute(
    params: Params, structure: Structure, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the parameters with units in another order: unit i of the result was unit P[i].

    Args:
        params: tensors, by name.
        structure: which permutation acts on which axis.
        permutations: P by name, int64 (units,); axes of absent names stay as they are.
    """
    return {
        name: permute_tensor(tensor, structure[name].axes, permutations)
        for name, tensor in params.items()
    }


def permute_tensor(
    tensor: Tensor, axes: tuple[str | None, ...], permutations: Mapping[str, Tensor]
) -> Tensor:
    """Return one tensor with each of its named axes permuted."""
    shape = tensor.shape
    for dim, axis in enumerate(axes):
        if axis is not None and (key := axis_layout(axis)[1]) in permutations:
            units = split_axis(tensor, dim, axis).index_select(dim + 1, permutations[key])
            tensor = units.reshape(shape)
    return tensor


def split_axis(tensor: Tensor, dim: int, axis: str) -> Tensor:
    """Return the tensor with one axis split into before x units x after; units are at dim + 1."""
    before, _, after = axis_layout(axis)
    shape = tensor.shape
    units = shape[dim] // (before * after)
    return tensor.reshape(*shape[:dim], before, units, after, *shape[dim + 1 :])


def units_first(tensor: Tensor, dim: int, axis: str) -> Tensor:
    """Return the entries of each unit of one axis as a row, (units, entries of a unit)."""
    return split_axis(tensor, dim, axis).movedim(dim + 1, 0).flatten(1)
