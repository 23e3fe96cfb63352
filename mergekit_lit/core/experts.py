"""This file is the nouns that every merge method speaks: Base, Expert, Experts, Merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.cards import Card
from mergekit_lit.core.params import (
    Params,
    add,
    is_finite,
    subtract,
    wide,
)
from mergekit_lit.core.specs import spec_of
from mergekit_lit.core.structure import Structure

BLOCK = 1 << 16
"""Entries of one block: small enough that a few experts' deltas stay in a processor's cache."""


@dataclass(frozen=True)
class Base:
    """A shared initialisation x0.

    Attributes:
        name: what cards call it.
        backbone: architecture, by the name that builds it.
        image_size: height and width of its input, in pixels.
        params: the backbone's tensors, statistics and counters included.
        structure: what each tensor is.
        content: content hash of `params`.
        facts: further facts, such as the tasks that it has seen and the accuracy reached there.
    """

    name: str
    backbone: str
    image_size: int
    params: Params
    structure: Structure
    content: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """A backbone fine-tuned on one task, with its head and card.

    Attributes:
        backbone: the tuned backbone's tensors, by the names of the base.
        head: `weight` (C, d) and `bias` (C,).
        structure: what each backbone tensor is.
        card: the deterministic facts of its training.
        path: the file that it came from, if any.
    """

    backbone: Params
    head: Params
    structure: Structure
    card: Card
    path: Path | None = None

    @property
    def name(self) -> str:
        """The task, or the file's stem where the task is unknown."""
        return self.card.task or (self.path.stem if self.path else "expert")


@dataclass(frozen=True)
class Experts:
    """T experts of one base: what a merge method takes.

    Attributes:
        base: the backbone's tensors at x0.
        tuned: T sets of tensors with the names and shapes of `base`; may be read lazily.
        structure: what each tensor is.
        cards: T cards.
        heads: T heads; empty mappings where unknown.
        names: T task names, unique.
        base_name: the base's name.
        base_hash: the base's content hash.
        backbone: the architecture.
        image_size: height and width of the input, in pixels.
        kept: names of tensors that merging leaves as they are in the base.
        apart: names of tensors that each task keeps from its own expert.
    """

    base: Params
    tuned: Sequence[Params]
    structure: Structure
    cards: Sequence[Card]
    heads: Sequence[Params]
    names: Sequence[str]
    base_name: str = ""
    base_hash: str = ""
    backbone: str = ""
    image_size: int = 0
    kept: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.tuned)

    def merged_names(self) -> list[str]:
        """Return the names that merging moves, sorted.

        These are no statistics, counters or integers, and no tensors without an entry.
        """
        stay = self.kept | self.apart
        specs = {name: spec_of(self.base, name) for name in self.base if name not in stay}
        return sorted(
            name
            for name, spec in specs.items()
            if self.structure[name].is_merged and spec.dtype.is_floating_point and spec.bytes
        )

    def deltas(self, name: str) -> Tensor:
        """Return tau_t = theta_t - theta_0 of one tensor, (T, *s), in float32 or better."""
        return torch.stack([self.delta(name, t) for t in range(len(self))])

    def delta(self, name: str, expert: int) -> Tensor:
        """Return tau_t = theta_t - theta_0 of one tensor and expert, in float32 or better."""
        base = wide(self.base[name])
        return self.tuned[expert][name].to(base.dtype) - base

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Go through one tensor's deltas in blocks of entries, whatever its shape.

        Yields:
            The place of the block's first entry, and tau_t of its entries, (T, n), n <= `BLOCK`.
        """
        base = wide(self.base[name]).reshape(-1)
        tuned = [unchecked(params, name).reshape(-1) for params in self.tuned]
        for start in range(0, len(base), BLOCK):
            part = base[start : start + BLOCK]
            deltas = torch.empty(len(tuned), len(part), dtype=part.dtype)
            for row, params in zip(deltas, tuned, strict=True):
                torch.sub(params[start : start + BLOCK].to(part.dtype), part, out=row)
            # Seen while the differences are in the cache; reading in full says what is wrong.
            if not is_finite(deltas):
                for checked in self.tuned:
                    checked.get(name)
            yield start, deltas


def unchecked(params: Params, name: str) -> Tensor:
    """Return a tensor without what its mapping does to look through it when it is first read."""
    read = getattr(params, "unchecked", params.__getitem__)
    tensor: Tensor = read(name)
    return tensor


@dataclass(frozen=True)
class Merged:
    """One merged model: shared tensors, and what each task keeps of its own.

    Attributes:
        shared: the backbone's tensors, statistics and counters included.
        own: per task, tensors that replace the shared ones, such as the last layers of its expert.
        statistics: per task, BatchNorm statistics that replace those.
        heads: per task, `weight` (C, d) and `bias` (C,).
        adapters: per task, what stands between backbone and head, as `core.adapters` has it.
        masks: per task, booleans of the shapes of `shared`: where the task takes the merge's step.
        base: the masked tensors at x0, to which a task returns where its mask is false.
        scales: per task, how much of the step it takes where its mask is true; 1 by default.
        structure: what each tensor is.
        facts: method, config, tasks, coefficients, base, base_hash, backbone, image_size ...
    """

    shared: Params
    structure: Structure
    heads: Mapping[str, Params] = field(default_factory=dict)
    own: Mapping[str, Params] = field(default_factory=dict)
    statistics: Mapping[str, Params] = field(default_factory=dict)
    adapters: Mapping[str, Params] = field(default_factory=dict)
    masks: Mapping[str, Params] = field(default_factory=dict)
    base: Params = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have a head, in the order of the merge."""
        return tuple(self.heads)

    def for_task(self, name: str) -> dict[str, Tensor]:
        """Return the plain backbone parameters for one task.

        theta_t = theta_0 + scale_t * mask_t * (theta - theta_0) where it has masks, else its own
        tensor or theta
        """
        masked = {
            tensor: self._masked(tensor, mask, self.scales.get(name, 1.0))
            for tensor, mask in self.masks.get(name, {}).items()
        }
        own, statistics = self.own.get(name, {}), self.statistics.get(name, {})
        return {**self.shared, **masked, **own, **statistics}

    def _masked(self, name: str, mask: Tensor, scale: float) -> Tensor:
        base, shared = self.base[name], self.shared[name]
        if scale == 1:
            return torch.where(mask, shared, base)
        step = subtract({name: shared}, {name: base})[name] * mask
        return add({name: base}, {name: step}, scale=scale)[name]
