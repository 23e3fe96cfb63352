"""This file is what is known of tensors before they are read or made: number types and shapes."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.params import Params


@dataclass(frozen=True)
class Spec:
    """Number type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes its entries take."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyParams(Mapping[str, Tensor]):
    """Tensors that are read or made when they are asked for, in the way of a subclass."""

    def __init__(self, names: Collection[str]) -> None:
        """Say which there are.

        Args:
            names: in the order in which they are gone through.
        """
        self._names = names

    def __contains__(self, name: object) -> bool:
        # What Mapping has would read or make the tensor.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Computed(LazyParams):
    """Tensors that are made when they are asked for, each time anew.

    Whoever goes through them once, as the writers of files do, holds one at a time.

    Attributes:
        specs: what each will be.
    """

    def __init__(self, specs: Mapping[str, Spec], make: Callable[[str], Tensor]) -> None:
        """Make nothing yet.

        Args:
            specs: number type and shape of each tensor.
            make: returns one by its name.
        """
        super().__init__(specs)
        self.specs = specs
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._make(name)

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape without making it."""
        return self.specs[name]


def spec_of(params: Params, name: str) -> Spec:
    """Return a tensor's number type and shape, without reading or making it where that can be."""
    told = getattr(params, "spec", None)
    if told is None:
        return Spec(params[name].dtype, tuple(params[name].shape))
    spec: Spec = told(name)
    return spec


def check_same_names_and_shapes(params: Params, reference: Params, *, source: str) -> None:
    """Refuse parameters whose names or shapes differ from a reference's.

    Raises:
        ValueError: names `source`, how many differ, and the first.
    """
    different = sorted(set(params) ^ set(reference))
    if different:
        raise ValueError(
            f"{source} and the base differ in {len(different)} parameter names, first "
            f"{different[0]!r}. Merge models of one architecture."
        )
    shapes = {
        name: (spec_of(params, name).shape, spec_of(reference, name).shape) for name in reference
    }
    unlike = [name for name, (own, wanted) in shapes.items() if own != wanted]
    if unlike:
        own, wanted = shapes[unlike[0]]
        raise ValueError(
            f"{source} and the base differ in the shapes of {len(unlike)} parameters, first "
            f"{unlike[0]!r}: {own} and {wanted}. "
            "Merge models of one architecture."
        )


def renamed(params: Params, names: Mapping[str, str]) -> Computed:
    """Return some of the tensors under new names, none of them read or made yet.

    Args:
        params: tensors.
        names: from the new name of each to its name in `params`.
    """
    specs = {new: spec_of(params, old) for new, old in names.items()}
    return Computed(specs, lambda new: params[names[new]])


def joined(groups: Mapping[str, Params]) -> Computed:
    """Return the tensors of several groups under prefix + name, none of them read or made yet."""
    places = {prefix + name: (params, name) for prefix, params in groups.items() for name in params}
    specs = {full: spec_of(params, name) for full, (params, name) in places.items()}

    def make(full: str) -> Tensor:
        params, name = places[full]
        return params[name]

    return Computed(specs, make)
