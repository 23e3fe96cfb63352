"""This file gathers experts from files, and refuses those that cannot be merged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lit.core.cards import Card
from mergekit_lit.core.checkpoints import match_names, open_tensors
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Base, Expert, Experts
from mergekit_lit.core.params import Params, check_finite
from mergekit_lit.core.permutations import has_axes
from mergekit_lit.core.shards import Shards
from mergekit_lit.core.specs import renamed
from mergekit_lit.core.tensorfiles import TensorFile
from mergekit_lit.merging.checking import Finite, check_kinds


def load_experts(
    paths: Sequence[Path],
    *,
    base: Base,
    allow_different_base: bool = False,
    headers_only: bool = False,
) -> Experts:
    """Open expert files, check each against the base and the others, and return them together.

    Files that others wrote (a safetensors file, a folder of shards, a `.pt` or Lightning `.ckpt`)
    are taken too where their tensors carry the base's names, behind a prefix or not; what is left
    over must be a classifier, which becomes the head. Their cards are empty, so they need
    `allow_different_base`; a file's stem stands for the task.

    Every tensor is read once here, so that a damaged or diverged file is refused before anything
    is computed; afterwards the tuned tensors are read again one by one when they are asked for.

    Args:
        paths: one file per expert, each of another task; their order is the order of the merge.
        base: the initialisation that all of them were tuned from.
        allow_different_base: take experts whose card names another base, or none.
        headers_only: read no tensor, so that damage and numbers that are none stay unnoticed;
            enough for a plan, or for checks before `read_through`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files; a file is damaged, would run code, or is no expert; names, shapes or
            number types differ from the base's; a number is NaN or infinite; two experts of one
            task; another base or image size.
    """
    if not paths:
        raise ValueError("Merging needs at least one expert file, but got none.")
    experts = [_open(Path(path), base) for path in paths]
    _check_tasks(experts)
    for expert in experts:
        if not allow_different_base:
            _check_base(expert, base)
        _check_image_size(expert, base)
        check_kinds(expert.backbone, base.params, source=_source(expert))
    opened = Experts(
        base=base.params,
        tuned=[Finite(expert.backbone, _source(expert)) for expert in experts],
        structure=base.structure,
        cards=[expert.card for expert in experts],
        heads=[Finite(expert.head, f"The head of {_file(expert)}") for expert in experts],
        names=[expert.name for expert in experts],
        base_name=base.name,
        base_hash=base.content,
        backbone=base.backbone,
        image_size=base.image_size,
    )
    return opened if headers_only else read_through(opened)


def read_through(experts: Experts) -> Experts:
    """Read every tensor of opened experts once; return them with their heads in memory.

    Raises:
        ValueError: a file is damaged, or a number is NaN or infinite.
    """
    check_finite(experts.base, source=f"The base {experts.base_name!r}")
    heads = []
    for tuned, head in zip(experts.tuned, experts.heads, strict=True):
        # Each looks through a tensor when it is first asked for it.
        for name in tuned:
            tuned[name]
        heads.append(dict(head))
    return replace(experts, heads=heads)


def in_memory(experts: Experts) -> Experts:
    """Return the same experts with every tensor read, for merging them more than once."""
    return replace(experts, tuned=[dict(tuned) for tuned in experts.tuned])


def _open(path: Path, base: Base) -> Expert:
    """Open one expert, ours or one that others wrote."""
    given = open_tensors(path)
    if isinstance(given, (TensorFile, Shards)) and given.facts.get("kind") not in (None, "plain"):
        return load_expert(path)
    source = f"Expert {str(path)!r}"
    names, left = match_names(given, base.params, source=source)
    return Expert(
        backbone=renamed(given, names),
        head=_classifier(given, left, source),
        structure=base.structure,
        card=Card(),
        path=path,
    )


def _classifier(given: Params, left: Sequence[str], source: str) -> dict[str, Tensor]:
    """Return `weight` (C, d) and `bias` (C,) from what no tensor of the base took, or nothing."""
    if not left:
        return {}
    head = {name.rpartition(".")[2]: given[name] for name in left}
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    rows = shapes.get("weight", ())[:1]
    linear = len(shapes.get("weight", ())) == 2 and shapes.get("bias", rows) == rows
    if not linear or len(left) > len(head) or set(head) - {"weight", "bias"}:
        raise ValueError(
            f"{source} and the base differ in {len(left)} parameter names, first {left[0]!r}; "
            "beside the base's tensors a file may hold one linear classifier. Merge models of one "
            "architecture."
        )
    return {"bias": torch.zeros(rows), **{name: tensor.float() for name, tensor in head.items()}}


def _check_tasks(experts: Sequence[Expert]) -> None:
    """Refuse two experts of one task: what a task keeps of its own is stored by its name."""
    seen: dict[str, Expert] = {}
    for expert in experts:
        if expert.name in seen:
            raise ValueError(
                f"Experts must be of different tasks, but {_file(seen[expert.name])} and "
                f"{_file(expert)} are both of {expert.name!r}. Leave one of them out."
            )
        seen[expert.name] = expert


def _check_base(expert: Expert, base: Base) -> None:
    """Refuse an expert that was not tuned from this very base, as far as its card tells."""
    card = expert.card
    if card.base_hash == base.content:
        return
    if card.base_hash is None:
        came = "its card names no base"
    else:
        came = f"it was tuned from {card.base or 'one'!r} ({card.base_hash[:12]})"
    if set(expert.backbone) != set(base.params):
        raise ValueError(
            f"{_file(expert)} must be of the architecture of the base {base.name!r}, but {came}, "
            "which has other parameters. Merge experts of one architecture."
        )
    merge = "Merge them as they are with `--allow_different_base true`."
    if has_axes(base.structure):
        align = "Align the experts with `--method git_rebasin --allow_different_base true`"
        merge = f"{align}, or m{merge[1:]}"
    raise ValueError(
        f"{_file(expert)} must be tuned from the base {base.name!r} ({base.content[:12]}), but "
        f"{came}. {merge}"
    )


def _check_image_size(expert: Expert, base: Base) -> None:
    size = expert.card.image_size
    if size is not None and size != base.image_size:
        raise ValueError(
            f"{_file(expert)} must be tuned at the base's image size of {base.image_size}, but "
            f"was tuned at {size}. Load the base at that size, or train the expert again."
        )


def _source(expert: Expert) -> str:
    return f"Expert {_file(expert)}"


def _file(expert: Expert) -> str:
    return repr(str(expert.path))
