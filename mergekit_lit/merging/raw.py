"""This file merges plain weight files: no architecture known, no card, a base file given."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mergekit_lit.core.cards import Card
from mergekit_lit.core.checkpoints import match_names, open_tensors
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.shards import write_shards
from mergekit_lit.core.specs import joined, renamed
from mergekit_lit.core.tensorfiles import write_tensors
from mergekit_lit.merging.checking import Finite, check_kinds
from mergekit_lit.merging.guessing import guessed_structure
from mergekit_lit.merging.patterns import is_match

HEADS = "re:(head|heads|fc|classifier)[.](?!norm[.]).*"
"""What heads are called in timm, torchvision and transformers; norms in them are the backbone's."""


def load_raw(paths: Sequence[Path], *, base: Path, heads: str = HEADS) -> Experts:
    """Open weight files as experts of a base file; only headers are read.

    Numbers are checked when a tensor is first read: NaN and infinity are refused.

    Args:
        paths: one file or folder per expert, as `core.checkpoints.open_tensors` takes them, in the
            order of the merge; an expert is called as its file, or as its folder where files are
            called alike.
        base: what all of them were tuned from, of any of these formats.
        heads: pattern of the tensors that are not merged, but kept for each expert as its head;
            empty for none. What experts hold beyond the base must be of a head.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files; two of one name; a file is damaged or would run code; names, shapes or
            kinds of numbers differ from the base's.
    """
    if not paths:
        raise ValueError("Merging needs at least one expert file, but got none.")
    opened = open_tensors(Path(base))
    backbone = {name: name for name in opened if not _is_head(heads, name)}
    params = Finite(renamed(opened, backbone), f"The base {str(base)!r}")
    experts = [_expert(Path(path), params, heads) for path in paths]
    return Experts(
        base=params,
        tuned=[backbone for backbone, _ in experts],
        structure=guessed_structure({name: params.spec(name) for name in params}),
        cards=[Card(task=name) for name in _names(paths)],
        heads=[head for _, head in experts],
        names=_names(paths),
        base_name=str(base),
    )


def save_raw(path: Path, merged: Merged, *, max_shard_bytes: int | None = None) -> list[Path]:
    """Write a merged model's tensors under their own names, as the experts' files have them.

    Heads are written beside them, `NAME.heads.safetensors`, as `TASK/name`. Both are atomic.

    Args:
        path: a file that ends in `.safetensors`.
        merged: a model without anything of its own per task but heads; held tensor by tensor where
            it is streamed.
        max_shard_bytes: write several files of at most so many bytes, as `core.shards` does.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be written (full disk, read-only folder).
        ValueError: the merge gave each task masks, tensors, statistics or adapters of its own,
            which plain files have no place for.
    """
    if merged.masks or merged.own or merged.statistics or merged.adapters:
        refuse_own_parts(str(merged.facts.get("method")))
    facts = {"kind": "plain", "facts": dict(merged.facts)}
    heads = {f"{task}/": head for task, head in merged.heads.items() if head}
    written = []
    if heads:
        written.append(path.with_name(f"{path.stem}.heads{path.suffix}"))
        write_tensors(written[0], joined(heads), facts)
    if max_shard_bytes is None:
        write_tensors(path, merged.shared, facts)
        return [path, *written]
    return [*write_shards(path, merged.shared, facts, max_shard_bytes=max_shard_bytes), *written]


def refuse_own_parts(method: str) -> NoReturn:
    """Refuse a merge that gives each task a part of its own, for which plain files have no place.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"Plain files hold one model for all tasks, but {method!r} gives each task a part of its "
        "own. Choose another method, or merge experts of mergekit-lit."
    )


def _expert(path: Path, base: Params, heads: str) -> tuple[Params, Params]:
    """Return the tensors that the base has too, and the head."""
    opened, source = open_tensors(path), f"Expert {str(path)!r}"
    names, left = match_names(opened, base, source=source)
    first = min(names)
    prefix = names[first].removesuffix(first)
    for name in left:
        if not _is_head(heads, name.removeprefix(prefix)):
            raise ValueError(
                f"{source} must hold nothing beyond the base's tensors but a head "
                f"({heads or 'none'}), but holds {name!r}. Say by `heads` what a head is called."
            )
    backbone = Finite(renamed(opened, names), source)
    check_kinds(backbone, base, source=source)
    return backbone, Finite(
        renamed(opened, {name.removeprefix(prefix): name for name in left}), source
    )


def _is_head(heads: str, name: str) -> bool:
    return bool(heads) and is_match(heads, name)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return what each expert is called: its file's stem, or its folder's name."""
    places = [Path(path).resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(
                f"Experts must be files of their own, but {str(path)!r} is given "
                f"{places.count(place)} times. Name it once."
            )
    stems = [_stem(Path(path)) for path in paths]
    if len(set(stems)) < len(stems):
        stems = [Path(path).resolve().parent.name for path in paths]
    for name in stems:
        if stems.count(name) > 1:
            raise ValueError(
                f"Experts must have names of their own, but {stems.count(name)} of them are called "
                f"{name!r}. Rename the files or their folders."
            )
    return stems


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name.removesuffix(".index.json").rpartition(".")[0]
