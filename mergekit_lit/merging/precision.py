"""This file is number types: in which one a merge computes, and in which its result is kept."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params, is_finite, wide
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.specs import LazyParams, Spec, spec_of

ComputeDtype = Literal["float32", "float64"]
"""In which number type a merge computes."""

OutputDtype = Literal["base", "float32", "float16", "bfloat16"]
"""In which number type the result is kept; `base` is each tensor's own in the base."""

_COMPUTE = {"float32": torch.float32, "float64": torch.float64}
_OUTPUT = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def compute_dtype(name: str | None) -> torch.dtype | None:
    """Return the number type by its name; None for None, which means float32 or the base's better.

    Raises:
        KeyError: no such name.
    """
    if name is not None and name not in _COMPUTE:
        raise KeyError(unknown_name("`dtype` of computation", name, _COMPUTE))
    return None if name is None else _COMPUTE[name]


def output_dtype(name: str) -> torch.dtype | None:
    """Return the number type by its name; None for `base`.

    Raises:
        KeyError: no such name.
    """
    if name != "base" and name not in _OUTPUT:
        raise KeyError(unknown_name("`out_dtype`", name, ["base", *_OUTPUT]))
    return None if name == "base" else _OUTPUT[name]


def computing_in(experts: Experts, dtype: torch.dtype | None) -> Experts:
    """Return the same experts over a base in a number type, in which their deltas then are too.

    Args:
        experts: T experts of one base.
        dtype: float32 or float64; None widens halves to float32 and leaves the rest.
    """
    base = experts.base
    if dtype is None and isinstance(base, dict) and all(map(_is_wide, base.values())):
        return experts
    return replace(experts, base=_In(base, dtype))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating-point tensor in a number type; others as they are.

    Raises:
        ValueError: a finite number became infinite.
    """
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    kept = tensor.to(dtype)
    if not is_finite(kept) and is_finite(tensor):
        largest = float(tensor.abs().max())
        raise ValueError(
            f"The result must fit into {dtype}, which ends at {torch.finfo(dtype).max:.3g}, but "
            f"{name!r} holds {largest:.3g}. Merge with a smaller scale, or keep the result in "
            "bfloat16 or float32 (`out_dtype`)."
        )
    return kept


def _is_wide(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or tensor.dtype in _COMPUTE.values()


class _In(LazyParams):
    """Tensors in a number type, cast when asked for; integers stay."""

    def __init__(self, params: Params, dtype: torch.dtype | None) -> None:
        super().__init__(params)
        self._params, self._dtype = params, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._params[name]
        if not tensor.is_floating_point():
            return tensor
        return wide(tensor) if self._dtype is None else tensor.to(self._dtype)

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape, without reading it where that can be."""
        spec = spec_of(self._params, name)
        if not spec.dtype.is_floating_point:
            return spec
        own = spec.dtype if spec.dtype in _COMPUTE.values() else torch.float32
        return Spec(self._dtype or own, spec.shape)
