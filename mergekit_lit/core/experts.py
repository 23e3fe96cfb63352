"""This file is the nouns that every merge method speaks: Base, Expert, Experts, Merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.bits import pack, unpack
from mergekit_lit.core.cards import Card
from mergekit_lit.core.params import (
    Params,
    add,
    is_finite,
    names_under,
    subtract,
    wide,
    with_prefix,
)
from mergekit_lit.core.shards import Shards, open_file, write_shards
from mergekit_lit.core.specs import joined, spec_of
from mergekit_lit.core.structure import Structure, structure_from_json, structure_to_json
from mergekit_lit.core.tensorfiles import TensorFile, floats, write_tensors

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


def save_base(path: Path, base: Base, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a base into one file; floating-point tensors are cast to `dtype`."""
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base.params.items()}
    facts = {
        "kind": "base",
        "base": {"name": base.name, "backbone": base.backbone, "image_size": base.image_size},
        "facts": dict(base.facts),
        "structure": structure_to_json(base.structure),
    }
    write_tensors(path, with_prefix(tensors, "backbone."), facts)


def save_expert(path: Path, expert: Expert) -> None:
    """Write backbone, head, structure and card into one file, atomically."""
    tensors = with_prefix(expert.backbone, "backbone.") | with_prefix(expert.head, "head.")
    facts = {
        "kind": "expert",
        "card": expert.card.to_json(),
        "structure": structure_to_json(expert.structure),
    }
    write_tensors(path, tensors, facts)


def load_expert(path: Path) -> Expert:
    """Open an expert file; its backbone is read tensor by tensor when asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no expert of ours, damaged, or a pickle.
    """
    file = open_file(path)
    _expect_kind(file, "expert")
    return Expert(
        backbone=file.under("backbone."),
        head=dict(file.under("head.")),
        structure=structure_from_json(file.facts["structure"]),
        card=Card.from_json(file.facts["card"]),
        path=Path(path),
    )


def save_merged(path: Path, merged: Merged, *, max_shard_bytes: int | None = None) -> None:
    """Write shared tensors, and what each task keeps of its own, atomically.

    Args:
        path: a file that ends in `.safetensors`.
        merged: the model; shared tensors that are computed when asked for are held one at a time.
        max_shard_bytes: write several files of at most so many bytes, and an index of them, as
            `core.shards` does; None writes one file.
    """
    groups: dict[str, Params] = {"shared.": merged.shared, "base.": merged.base}
    for task, masks in merged.masks.items():
        groups[f"tasks/{task}/mask."] = {name: pack(mask) for name, mask in masks.items()}
    groups |= {f"tasks/{task}/own.": own for task, own in merged.own.items()}
    groups |= {f"tasks/{task}/bn.": own for task, own in merged.statistics.items()}
    groups |= {f"tasks/{task}/adapter.": own for task, own in merged.adapters.items()}
    groups |= {f"heads/{task}.": head for task, head in merged.heads.items()}
    facts = {
        "kind": "merged",
        "tasks": list(merged.heads),
        "scales": dict(merged.scales),
        "facts": dict(merged.facts),
        "structure": structure_to_json(merged.structure),
    }
    if max_shard_bytes is None:
        write_tensors(path, joined(groups), facts)
    else:
        write_shards(path, joined(groups), facts, max_shard_bytes=max_shard_bytes)


def load_merged(path: Path) -> Merged:
    """Read what `save_merged` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no merged model of ours, damaged, or a pickle.
    """
    file = open_file(path)
    _expect_kind(file, "merged")
    tasks = file.facts["tasks"]
    own = {task: _under(file, f"tasks/{task}/own.") for task in tasks}
    statistics = {task: _under(file, f"tasks/{task}/bn.") for task in tasks}
    adapters = {task: _under(file, f"tasks/{task}/adapter.") for task in tasks}
    shared = _under(file, "shared.")
    masks = {task: _masks(file, task, shared) for task in tasks}
    return Merged(
        shared=shared,
        structure=structure_from_json(file.facts["structure"]),
        heads={task: _head(file, task) for task in tasks},
        own={task: tensors for task, tensors in own.items() if tensors},
        statistics={task: tensors for task, tensors in statistics.items() if tensors},
        adapters={task: tensors for task, tensors in adapters.items() if tensors},
        masks={task: tensors for task, tensors in masks.items() if tensors},
        base=_under(file, "base."),
        scales=file.facts.get("scales", {}),
        facts=file.facts["facts"],
    )


def file_kind(path: Path) -> str:
    """Return `base`, `expert`, `merged`, or `foreign` for tensors that others wrote."""
    return str(open_file(path).facts.get("kind", "foreign"))


def load_base_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a base file: its tensors in float32, and the facts of its header."""
    file = open_file(path)
    _expect_kind(file, "base")
    return floats(_under(file, "backbone.")), file.facts


def _under(file: TensorFile | Shards, prefix: str) -> dict[str, Tensor]:
    return {short: file[name] for short, name in names_under(file, prefix).items()}


def _masks(file: TensorFile | Shards, task: str, shared: Params) -> dict[str, Tensor]:
    packed = _under(file, f"tasks/{task}/mask.")
    return {name: unpack(tensor, shared[name].shape) for name, tensor in packed.items()}


def _head(file: TensorFile | Shards, task: str) -> dict[str, Tensor]:
    """Return `weight` and `bias` of one task; a dot left over belongs to a longer task's name."""
    tensors = names_under(file, f"heads/{task}.")
    return {short: file[name] for short, name in tensors.items() if "." not in short}


def _expect_kind(file: TensorFile | Shards, kind: str) -> None:
    found = file.facts.get("kind", "foreign")
    if found != kind:
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(
            f"{str(file.path)!r} must be {article} {kind} file of mergekit-lit, but is of kind "
            f"{found!r}. See what it holds: mergekit-lit card {file.path}"
        )
