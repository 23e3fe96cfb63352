"""Bases that files hold whole: the same as the ones that a network was built for, or none."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_base
from mergekit_lit.core.experts import Base
from mergekit_lit.core.tensorfiles import write_tensors
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.bases import stored_base


def card_of(base: Base) -> Card:
    return Card(
        base=base.name,
        base_hash=base.content,
        backbone=base.backbone,
        image_size=base.image_size,
    )


def same(left: Base | None, right: Base) -> bool:
    plain = [replace(base, params={}) for base in (left, right) if base is not None]
    return (
        left is not None
        and plain[0] == plain[1]
        and left.params.keys() == right.params.keys()
        and all(torch.equal(left.params[name], tensor) for name, tensor in right.params.items())
    )


@pytest.mark.parametrize("spec", ["resnet", "vit"])
def test_shipped_bases_are_those_of_the_built_networks(spec):
    _, base = load_base(spec)
    assert same(stored_base(spec, card=card_of(base), structure=base.structure), base)


def test_files_of_ours_and_of_others(tmp_path):
    _, base = load_base("resnet@random:1")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_base(ours, base)
    classifier = {"fc.weight": torch.ones(3, 256), "fc.bias": torch.zeros(3)}
    write_tensors(theirs, {**base.params, **classifier}, {})
    for spec in (str(ours), f"resnet@{ours}", f"resnet@{theirs}"):
        _, expected = load_base(spec)
        assert same(stored_base(spec, card=card_of(base), structure=base.structure), expected), spec


@pytest.mark.parametrize("spec", ["vit", "resnet@random:0", "timm/test_resnet", "no.safetensors"])
def test_none_where_only_a_network_can_tell(spec):
    _, base = load_base("resnet@random:0")
    assert stored_base(spec, card=card_of(base), structure=base.structure) is None


def test_none_at_another_size_or_of_an_unknown_card():
    _, base = load_base("vit", image_size=48)  # its positions are resampled
    assert stored_base("vit", card=card_of(base), structure=base.structure) is None
    _, base = load_base("resnet", image_size=64)  # the size is no part of its tensors
    found = stored_base("resnet", card=card_of(base), structure=base.structure)
    assert same(found, base)
    assert stored_base("resnet", card=Card(), structure=base.structure) is None
