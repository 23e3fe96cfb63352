"""This file is the algebra of parameters: named tensors as one long vector."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = Mapping[str, Tensor]
"""Named tensors. Always read-only to the functions that take them."""


def subtract(left: Params, right: Params) -> dict[str, Tensor]:
    """Return left - right in float32 or better, over the names of `left`."""
    return {name: wide(tensor) - wide(right[name]) for name, tensor in left.items()}


def add(base: Params, step: Params, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Return base + scale * step in the dtypes of `base`; names that `step` lacks stay as they are.

    Sums run in float32 or better and are cast once.
    """
    moved = {}
    for name, tensor in base.items():
        if name in step:
            total = wide(tensor) + scale * wide(step[name])
            moved[name] = total.to(tensor.dtype)
        else:
            moved[name] = tensor
    return moved


def dot(left: Params, right: Params) -> float:
    """Return <left, right> over the names of `left`, accumulated in float64."""
    return sum(
        float(torch.dot(tensor.double().flatten(), right[name].double().flatten()))
        for name, tensor in left.items()
    )


def norm(params: Params) -> float:
    """Return the L2 norm of all entries, accumulated in float64."""
    return math.sqrt(dot(params, params))


def flat(params: Params) -> Tensor:
    """Return all entries as one vector, in the order of the names."""
    return torch.cat([tensor.flatten() for tensor in params.values()])


def count(params: Params) -> int:
    """Return the number of entries."""
    return sum(tensor.numel() for tensor in params.values())


def content_hash(params: Params) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the raw bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_finite(params: Params, *, source: str) -> None:
    """Refuse NaN and infinite entries.

    Raises:
        ValueError: names `source` and the first tensor that holds one.
    """
    for name, tensor in params.items():
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source} must hold finite numbers, but {name!r} has {bad} NaN or infinite of "
                f"{tensor.numel()} entries. Train again with a lower learning rate, "
                "clipping, or in `32-true`."
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    # A finite sum has finite terms, and takes a thirtieth of the time of a look at each of them;
    # the sum of large finite terms can overflow, and is then no proof.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def with_prefix(params: Params, prefix: str) -> dict[str, Tensor]:
    """Return the same tensors under `prefix` + name."""
    return {f"{prefix}{name}": tensor for name, tensor in params.items()}


def names_under(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return a mapping of short name to full name for the names that start with `prefix`."""
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
