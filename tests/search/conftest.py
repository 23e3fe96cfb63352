"""What tests of searches share: a tiny ViT and a tiny ResNet, each with two tuned experts."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Expert, save_expert
from mergekit_lit.core.params import add
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.passes import features_of
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import fit_ncm
from mergekit_lit.stages.images import Calibration

VIT, RESNET = "timm/test_vit@random:0", "timm/test_resnet@random:0"
TASKS = ("dots", "stripes")
SPLIT = SplitOptions(reserve=8, val_share=0.4)


@dataclass
class Family:
    """Files of two experts of one base, and where their images are."""

    spec: str
    paths: list[Path]
    calibration: Calibration


def make_family(spec: str, folder: Path, suite: str) -> Family:
    """Write two experts whose heads know their tasks, and whose steps are random."""
    backbone, base = load_base(spec, image_size=32)
    paths = [folder / f"{task}.safetensors" for task in TASKS]
    for seed, (task, path) in enumerate(zip(TASKS, paths, strict=True)):
        data = load_suite(suite).task(task).load(SPLIT)
        head = fit_ncm(*features_of(backbone.eval(), data.train), len(data.classes))
        draw = torch.Generator().manual_seed(seed)
        step = {
            name: 0.03 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in base.params.items()
            if base.structure[name].is_merged
        }
        card = Card(
            task=task,
            base=spec,
            base_hash=base.content,
            backbone=base.backbone,
            image_size=32,
            travel=1.0 + seed,
        )
        save_expert(path, Expert(add(base.params, step), head, base.structure, card))
    return Family(spec, paths, Calibration(suite=suite, options=SPLIT, images=40))


@pytest.fixture(scope="session")
def vits(tmp_path_factory: pytest.TempPathFactory, tiny_suite: str) -> Family:
    return make_family(VIT, tmp_path_factory.mktemp("vits"), tiny_suite)


@pytest.fixture(scope="session")
def resnets(tmp_path_factory: pytest.TempPathFactory, tiny_suite: str) -> Family:
    return make_family(RESNET, tmp_path_factory.mktemp("resnets"), tiny_suite)
