"""This file opens what is merged: experts with their base, or weight files of others."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lit.core.checkpoints import WEIGHT_SUFFIXES
from mergekit_lit.core.expert_files import file_kind, load_expert
from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.models.bases import stored_base

if TYPE_CHECKING:
    from mergekit_lit.models.backbones import Backbone

# What is read of a plain file to tell it from others.
_PAGE, _PAGES = 4096, 256


def base_of(experts: Sequence[Path], base: str | None = None) -> Base:
    """Return the base that `base` names, or else the one that the first expert's card names.

    A base that a file holds whole is read from it, without building its network.

    Raises:
        FileNotFoundError: the first expert is missing.
        KeyError: `base` names no backbone.
        ValueError: there is no expert, or its card names no base that can be loaded.
    """
    expert, spec = _named_base(experts, base)
    stored = stored_base(spec, card=expert.card, structure=expert.structure)
    return load_base_of(experts, base)[1] if stored is None else stored


def load_base_of(experts: Sequence[Path], base: str | None = None) -> tuple["Backbone", Base]:
    """Return the same base with its network.

    Raises:
        FileNotFoundError: the first expert is missing.
        KeyError: `base` names no backbone.
        ValueError: there is no expert, or its card names no base that can be loaded.
    """
    # Here, because it takes seconds that a merge without images need not wait.
    from mergekit_lit.models.backbones import load_base

    expert, spec = _named_base(experts, base)
    try:
        return load_base(spec, image_size=expert.card.image_size)
    except (KeyError, FileNotFoundError) as error:
        if base is not None:
            raise
        raise ValueError(
            f"The base {spec!r} that the card of {str(experts[0])!r} names must be loadable here, "
            f"but is not: {error.args[0]} Give `base`."
        ) from error


def _named_base(experts: Sequence[Path], base: str | None) -> tuple[Expert, str]:
    """Return the first expert that is one of ours, and the spec of the base."""
    if not experts:
        raise ValueError("Merging needs at least one expert file, but got none.")
    # A base is a name, `FILE` or `backbone@FILE`.
    place = (base or "").rpartition("@")[2]
    is_there = any(Path(file).exists() for file in (base or "", place))
    if base and place.endswith(WEIGHT_SUFFIXES) and not is_there:
        raise FileNotFoundError(f"No file {place!r}, which `base` names.")
    ours = next((path for path in experts if not is_plain(str(path))), None)
    if ours is None:
        came = "got none" if base is None else f"{base!r} is no file or folder that is there"
        raise ValueError(
            f"Plain weights such as {str(experts[0])!r} need `--base FILE`, the weights that they "
            f"were tuned from, but {came}."
        )
    expert = load_expert(ours)
    spec = base or expert.card.base
    if spec is None:
        raise ValueError(
            f"The card of {str(ours)!r} must name its base, but does not. Give `base`."
        )
    return expert, spec


def several_bases(experts: Sequence[Path]) -> bool:
    """Return whether the cards name more than one base, by its hash.

    Raises:
        FileNotFoundError: an expert is missing.
        ValueError: they name more than one architecture.
    """
    cards = {path: load_expert(path).card for path in experts if file_kind(path) == "expert"}
    built = {card.backbone: path for path, card in cards.items() if card.backbone is not None}
    if len(built) > 1:
        (one, first), (other, second) = list(built.items())[:2]
        raise ValueError(
            f"Experts must be of one architecture, but {str(first)!r} is a {one!r} and "
            f"{str(second)!r} a {other!r}. Keep them apart: nothing here merges these."
        )
    return len({card.base_hash for card in cards.values()} - {None}) > 1


def architecture_of(base: Base) -> "Backbone":
    """Return a network of the base's architecture, with weights without meaning."""
    from mergekit_lit.models.backbones import build_backbone

    return build_backbone(base.backbone, base.image_size)


def is_plain(base: str | None) -> bool:
    """Return whether a base is a file or folder of weights that others wrote, so no base of ours.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(base or "")
    if base is None or not path.exists():
        return False
    return path.suffix != ".safetensors" or path.is_dir() or file_kind(path) in ("foreign", "plain")


def fingerprint(path: Path, *, plain: bool) -> str:
    """Return what tells a file from others: the SHA-256 of its bytes.

    Plain files are large, and tuned ones differ nearly everywhere: there it is taken of the size,
    the start and 256 evenly spaced pages, and says so: `pages:...`. Of a folder all weight files
    count.
    """
    if not plain:
        return file_hash(path)
    digest = hashlib.sha256()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}|{size}|".encode())
        with file.open("rb") as pages:
            for place in range(0, size, max(_PAGE, size // _PAGES)):
                pages.seek(place)
                digest.update(pages.read(_PAGE))
    return f"pages:{digest.hexdigest()}"
