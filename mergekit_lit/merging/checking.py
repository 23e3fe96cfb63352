"""This file refuses experts that do not fit their base, and numbers that are none."""

from dataclasses import replace

from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params, check_finite
from mergekit_lit.core.specs import LazyParams, Spec, check_same_names_and_shapes, spec_of


class Finite(LazyParams):
    """Tensors of which each is looked through for NaN and infinity when it is first read."""

    def __init__(self, params: Params, source: str) -> None:
        """Read nothing yet.

        Args:
            params: tensors.
            source: what messages call them.
        """
        super().__init__(params)
        self._params, self._source = params, source
        self._unread = set(params)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it holds NaN or infinity.
        """
        tensor = self._params[name]
        if name in self._unread:
            check_finite({name: tensor}, source=self._source)
            self._unread.remove(name)
        return tensor

    def unchecked(self, name: str) -> Tensor:
        """Return one tensor for a reader that looks through it himself."""
        return self._params[name]

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape, without reading it where that can be."""
        return spec_of(self._params, name)


def checked(experts: Experts) -> Experts:
    """Return the same experts, once each has the base's tensors; NaN is refused when it is read.

    Raises:
        ValueError: nothing to merge; or names, shapes or kinds of numbers differ from the base's.
    """
    if not experts.merged_names():
        raise ValueError(
            "The base must have floating-point tensors to merge, but has none. Give the base that "
            "the experts were tuned from."
        )
    tuned = []
    for name, params in zip(experts.names, experts.tuned, strict=True):
        source = f"Expert {name!r}"
        check_kinds(params, experts.base, source=source)
        tuned.append(_looked_through(params, source))
    return replace(experts, base=_looked_through(experts.base, "The base"), tuned=tuned)


def _looked_through(params: Params, source: str) -> Finite:
    return params if isinstance(params, Finite) else Finite(params, source)


def check_kinds(params: Params, base: Params, *, source: str) -> None:
    """Refuse parameters whose names, shapes or kinds of numbers are not the base's, by headers.

    Raises:
        ValueError: names `source` and the first that differs.
    """
    check_same_names_and_shapes(params, base, source=source)
    for name in params:
        own, wanted = spec_of(params, name).dtype, spec_of(base, name).dtype
        if own.is_floating_point != wanted.is_floating_point:
            raise ValueError(
                f"{source} must hold the base's kinds of numbers, but {name!r} is of {own} and "
                f"there of {wanted}. Save it in floating point."
            )
