"""This file is what merge methods and their observers agree on: the forms and the protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.structure import TensorInfo

Form = Literal["linear", "kernel", "whole", "experts"]
"""How a method is written.

`linear`: f(experts, *, config) -> coefficients lambda, (T,), or such a row for each tensor by name;
    the step is sum_t lambda_t tau_t.
`kernel`: f(slice, *, config) -> the step of one tensor, (*s). It may declare `prepare`, a function
    g(pairs of name and deltas, *, some of the config) -> stats, which sees every tensor
    first, in as many passes as it likes. A kernel whose entries do not depend on one another
    declares `elementwise` (True, or a function of its config), and then sees blocks of entries.
    Where parameters are given by pattern, each tensor is merged under its own values, and `prepare`
    runs for each group of tensors that agree in the values it looks at. A method may declare one
    parameter as `together`: `prepare` then gets all its values of several merges at once, and
    returns the stats of each.
`whole`: f(experts, *, config) -> Merged.
`experts`: f(experts, *, config) -> Experts, such as an alignment; their average is the merge.

A method of the form `linear` or `kernel` whose step is exactly its parameter `scale`, at least 0,
times something else declares `homogeneous`: it is then run at a scale of 1 alone.

A method of the form `whole` or `experts`, or a veneer, may declare `check`, a function
g(experts, *, some of the config) that refuses by their headers alone what it cannot merge. One
whose result is a model for each task declares `per_task` (True, or a function of its config), and
one whose result holds adapters declares `adapters`.

A method of any form but `kernel` that declares a split of images as its data takes a
`core.calibration.Calibration` as its second argument, and runs on one thread.
"""

DataUse = Literal["none", "cards", "train", "val", "test-unlabelled"]
"""What a method needs beside the experts' tensors."""

BatchNormPolicy = Literal["base", "average", "recalibrate", "recalibrate-per-task"]
"""Where the merged model's BatchNorm statistics come from."""


@dataclass(frozen=True)
class Slice:
    """One tensor of the merge, or one block of its entries: what a per-tensor kernel sees.

    Attributes:
        name: the tensor's name.
        base: its value at x0, (*s).
        each: tau_t of each expert, T of shape (*s), float32 or better; read when asked for, so
            that a method that needs one at a time holds one.
        info: what the tensor is.
        stats: what the method's `prepare` function returned; empty without one.
        seed: seed of the merge; draw from `core.seeds.generator(seed, name, expert, offset)`.
        offset: place of the first entry in the tensor; 0 but for elementwise methods, which get
            tensors in blocks of `core.experts.BLOCK` entries, (n,).
    """

    name: str
    base: Tensor
    each: Sequence[Tensor] | Tensor
    info: TensorInfo
    stats: Mapping[str, Any]
    seed: int
    offset: int = 0

    @cached_property
    def deltas(self) -> Tensor:
        """tau_t of all experts, (T, *s)."""
        return self.each if isinstance(self.each, Tensor) else torch.stack(list(self.each))


@runtime_checkable
class MergeObserver(Protocol):
    """Sees a merge from start to end, and may replace the deltas that the method gets.

    Each tensor is shown once, before the method runs; deltas that an observer returns are held in
    memory until the merge ends, and the next observer sees them.
    """

    def on_merge_start(self, experts: Experts, method: str, config: Mapping[str, Any]) -> None:
        """Called once, before any tensor is read."""

    def on_merge_tensor(self, name: str, deltas: Tensor) -> Tensor | None:
        """Called with tau_t (T, *s) of each tensor; return other deltas, or None to leave them."""

    def on_merge_end(self, experts: Experts, merged: Merged) -> None:
        """Called once, with the result."""
