"""This file is passes over experts: tensor by tensor, or block by block, never all at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, unchecked
from mergekit_lit.core.params import wide
from mergekit_lit.merging.reductions import total


class Deltas(Sequence[Tensor]):
    """tau_t of one tensor for each expert, (*s), read when asked for."""

    def __init__(self, experts: Experts, name: str) -> None:
        self._experts = experts
        self._name = name

    def __len__(self) -> int:
        return len(self._experts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return [self._experts.delta(self._name, expert) for expert in chosen]
        return self._experts.delta(self._name, chosen)


class Pairs(Iterable[tuple[str, Tensor]]):
    """The name and the deltas of every merged tensor, as often as they are asked for.

    Whole tensors give (T, *s); in blocks, each name comes with several (T, n).
    """

    def __init__(self, experts: Experts, *, in_blocks: bool = False) -> None:
        self._experts = experts
        self._in_blocks = in_blocks

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._experts.merged_names():
            if self._in_blocks:
                yield from ((name, deltas) for _, deltas in self._experts.blocks(name))
            else:
                yield name, self._experts.deltas(name)

    def sample(self, count: int) -> tuple[Tensor, int]:
        """Return evenly spaced entries of all deltas, (T, m), without reading the others.

        Args:
            count: about how many of each expert are asked for; all where there are fewer.

        Returns:
            The entries, in float32 or better; and how many each expert has in all.
        """
        names = self._experts.merged_names()
        tensors = {name: self._experts.base[name].reshape(-1) for name in names}
        entries = sum(len(tensor) for tensor in tensors.values())
        stride = max(1, entries // count) | 1  # odd: widths of layers tend to be even
        parts, before = [torch.zeros(len(self._experts), 0)], 0
        for name, tensor in tensors.items():
            base = wide(tensor[-before % stride :: stride])
            tuned = [unchecked(params, name).reshape(-1) for params in self._experts.tuned]
            taken = [t[-before % stride :: stride].to(base.dtype) - base for t in tuned]
            parts.append(torch.stack(taken))
            before += len(tensor)
        return torch.cat(parts, dim=1), entries


Blocks = Callable[[Tensor, int], Tensor]
"""f(deltas (T, n), place of the first entry) -> (n,): one block of a tensor that is made."""


def blockwise(experts: Experts, name: str, functions: Sequence[Blocks]) -> list[Tensor]:
    """Return of each function its blocks joined to (*s); each block is read once for all.

    Raises:
        ValueError: a function returns another shape.
    """
    base = experts.base[name]
    made = [torch.empty(base.shape, dtype=wide(base).dtype) for _ in functions]
    for start, deltas in experts.blocks(name):
        for whole, function in zip(made, functions, strict=True):
            part = function(deltas, start)
            if part.shape != deltas.shape[1:]:
                raise ValueError(
                    f"The step of {name!r} must have shape {tuple(deltas.shape[1:])}, but has "
                    f"{tuple(part.shape)}."
                )
            whole.view(-1)[start : start + len(part)] = part
    return made


def reduced(experts: Experts, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return f(deltas (T, n)) -> (n,) of one tensor, block by block, joined to (*s)."""
    (found,) = blockwise(experts, name, [lambda deltas, _: function(deltas)])
    return found


def mean_delta(experts: Experts, name: str) -> Tensor:
    """Return the mean of one tensor's deltas, (*s)."""
    return reduced(experts, name, lambda deltas: deltas.mean(dim=0))


def squared_lengths(experts: Experts, name: str) -> Tensor:
    """Return ||tau_t||^2 of one tensor, (T,), in float64; it holds one expert's at a time."""
    each = (experts.delta(name, t).double() for t in range(len(experts)))
    return torch.stack([total(delta.square()) for delta in each])
