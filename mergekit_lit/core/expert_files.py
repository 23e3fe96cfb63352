"""This file is how bases, experts and merged models are kept in files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.bits import pack, unpack
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Expert, Merged
from mergekit_lit.core.params import Params, names_under, with_prefix
from mergekit_lit.core.shards import Shards, open_file, write_shards
from mergekit_lit.core.specs import joined
from mergekit_lit.core.structure import structure_from_json, structure_to_json
from mergekit_lit.core.tensorfiles import TensorFile, floats, write_tensors


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
