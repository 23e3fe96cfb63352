"""This file is steps: shares of experts, weighted sums of deltas, and the base moved by them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mergekit_lit.core.params import Params, add


def shares_of(weights: Sequence[float] | None, count: int, names: Sequence[str] = ()) -> Tensor:
    """Return weights >= 0 divided by their sum, (T,), in float64; equal ones for None.

    Raises:
        ValueError: not one weight for each of `count` experts, one below 0, or all 0.
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if len(weights) != count:
        known = f" ({', '.join(names)})" if names else ""
        raise ValueError(
            f"`weights` must hold one number for each of the {count} experts{known}, but holds "
            f"{len(weights)}."
        )
    shares = torch.tensor(weights, dtype=torch.float64)
    if bool((shares < 0).any()) or not bool((shares > 0).any()):
        raise ValueError(f"`weights` must be at least 0 and not all 0, but are {list(weights)!r}.")
    shares = shares / shares.max()
    return shares / shares.sum()


def weighted_sum(coefficients: Tensor, deltas: Tensor) -> Tensor:
    """Return sum_t lambda_t tau_t, (*s), of one tensor's deltas (T, *s), in their dtype.

    Each lambda_t is a number, or a tensor that broadcasts to (*s).
    """
    step = torch.zeros_like(deltas[0])
    # One term after the other: a matrix product would round differently by number of threads.
    for coefficient, delta in zip(coefficients, deltas, strict=True):
        step = step + coefficient.to(delta.dtype) * delta
    return step


def sum_of(parts: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the sum of tensors of one shape, at least one, of which it holds one at a time.

    Args:
        parts: the tensors.
        dtype: what is added up in, and returned; None for the dtype of the parts.
    """
    each = iter(parts)
    total = next(each).to(dtype, copy=True)
    for part in each:
        total += part
    return total


def moved(base: Params, steps: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return base + step in the base's dtypes, in its order; tensors without a step stay.

    Raises:
        ValueError: a step has not the shape of its tensor.
    """
    result = dict(base)
    for name, step in steps:
        if step.shape != base[name].shape:
            raise ValueError(
                f"The step of {name!r} must have shape {tuple(base[name].shape)}, but has "
                f"{tuple(step.shape)}."
            )
        result |= add({name: base[name]}, {name: step})
    return result
