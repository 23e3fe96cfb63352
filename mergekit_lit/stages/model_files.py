"""This file opens model files of every kind, and names what they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lit.core.expert_files import file_kind, load_expert, load_merged
from mergekit_lit.core.experts import Base, Expert, Merged
from mergekit_lit.core.files import file_hash
from mergekit_lit.lit.evaluation import Model
from mergekit_lit.models.backbones import Backbone, build_backbone, load_base


@dataclass(frozen=True)
class Models:
    """What the files held.

    Attributes:
        by_name: models by name.
        backbone: their architecture.
        inputs: content hash of each file or base, by its path or spec as given.
    """

    by_name: Mapping[str, Model]
    backbone: Backbone
    inputs: Mapping[str, str]


def load_models(models: Sequence[str | Path]) -> Models:
    """Open files and bases; experts become one model where their tasks differ.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no model, another architecture, or a file that is no model of ours.
    """
    if not models:
        raise ValueError("`models` must name at least one file or base, but is empty.")
    opened = _opened([str(given) for given in models])
    names = _names(opened)
    by_name: dict[str, Model] = {names[given]: model for given, model in opened.items()}
    experts = [model for model in opened.values() if isinstance(model, Expert)]
    if len({expert.name for expert in experts}) == len(experts) > 0:
        rest = {k: model for k, model in by_name.items() if not isinstance(model, Expert)}
        by_name = {**rest, "experts": experts}
    hashes = {
        given: model.content if isinstance(model, Base) else file_hash(Path(given))
        for given, model in opened.items()
    }
    return Models(by_name, _backbone(opened), hashes)


def _opened(models: Sequence[str]) -> dict[str, Base | Expert | Merged]:
    """Open files by their kind; anything else is the spec of a base, at the files' image size."""
    kinds = {given: file_kind(Path(given)) for given in models if Path(given).is_file()}
    files = {given: _open_file(given, kind) for given, kind in kinds.items() if kind != "base"}
    size = next((size for _, size in map(_architecture, files.values()) if size), None)
    return {
        given: files[given] if given in files else load_base(given, image_size=size)[1]
        for given in models
    }


def _open_file(given: str, kind: str) -> Expert | Merged:
    if kind == "expert":
        return load_expert(Path(given))
    if kind == "merged":
        return load_merged(Path(given))
    raise ValueError(
        f"{given!r} must be a base, an expert or a merged model of mergekit-lit, but is of kind "
        f"{kind!r}. See what it holds: mergekit-lit card {given}"
    )


def _names(opened: Mapping[str, Base | Expert | Merged]) -> dict[str, str]:
    """Return a name for each model: `base` if there is one, else the file's stem, made unique."""
    bases = [given for given, model in opened.items() if isinstance(model, Base)]
    names = {given: Path(given).stem if Path(given).is_file() else given for given in opened}
    if len(bases) == 1:
        names[bases[0]] = "base"
    taken = list(names.values())
    return {
        given: name if taken.count(name) == 1 and name != "experts" else given
        for given, name in names.items()
    }


def _backbone(opened: Mapping[str, Base | Expert | Merged]) -> Backbone:
    """Build the one architecture that all models share."""
    found: dict[tuple[str, int], str] = {}
    for given, model in opened.items():
        name, size = _architecture(model)
        if name is not None and size is not None:
            found.setdefault((name, size), given)
    if not found:
        raise ValueError(
            "The models must say which backbone they are, but their cards do not. "
            "Name their base too."
        )
    if len(found) > 1:
        (first, given), (second, other) = list(found.items())[:2]
        raise ValueError(
            f"Models evaluated together must share backbone and image size, but {given!r} is "
            f"{first[0]} at {first[1]} px and {other!r} is {second[0]} at {second[1]} px. "
            "Evaluate them apart."
        )
    ((name, size),) = found
    return build_backbone(name, size)


def _architecture(model: Base | Expert | Merged) -> tuple[str | None, int | None]:
    if isinstance(model, Merged):
        return model.facts.get("backbone"), model.facts.get("image_size")
    facts = model.card if isinstance(model, Expert) else model
    return facts.backbone, facts.image_size
