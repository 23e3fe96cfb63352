"""This file is bases that files hold whole: found without building a network, and so without timm.

`models.backbones.load_base` takes every spec and builds the network that it names. Merging needs
the base's tensors alone; where a file holds them as they are, reading it is enough.
"""

from pathlib import Path

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_base_file
from mergekit_lit.core.experts import Base
from mergekit_lit.core.params import content_hash
from mergekit_lit.core.structure import Structure
from mergekit_lit.models.weights import OURS, Weights, file_weights, shipped_weights


def stored_base(spec: str, *, card: Card, structure: Structure) -> Base | None:
    """Return the base of an expert, if a file holds it as the expert was tuned from it.

    Args:
        spec: the base, as `load_base` takes it.
        card: the expert's; its base hash proves that the file's tensors are the right ones.
        structure: of the expert, which is its base's too.

    Returns:
        What `load_base` returns, or None where only that can tell: other hashes, other image
        sizes, weights that are drawn or come from a hub, files that are not there.
    """
    found = _stored_weights(spec)
    if found is None or card.backbone is None or card.image_size is None:
        return None
    name, (weights, facts) = found
    params = {key: weights[key] for key in structure if key in weights}
    content = content_hash(params)
    if content != card.base_hash:
        return None
    dropped = sorted(set(weights) - set(params))
    return Base(
        name=name,
        backbone=card.backbone,
        image_size=card.image_size,
        params=params,
        structure=structure,
        content=content,
        facts={**facts, "dropped": dropped} if dropped else facts,
    )


def _stored_weights(spec: str) -> tuple[str, Weights] | None:
    """Return the base's name, and what the file holds that `spec` names, if it names one."""
    name, _, source = spec.partition("@")
    if spec in OURS:
        return spec, shipped_weights(spec)
    if source.endswith(".safetensors") and Path(source).is_file():
        return spec, file_weights(Path(source))
    if not source and name.endswith(".safetensors") and Path(name).is_file():
        weights, header = load_base_file(Path(name))
        return header["base"]["name"], (weights, header["facts"])
    return None
