"""What tests of searches share: two tiny experts of a ViT and a ResNet, and the experiments."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.passes import features_of
from mergekit_lit.models.heads import fit_ncm
from mergekit_lit.stages.images import Calibration

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SPLIT = SplitOptions(reserve=8, val_share=0.4)


@pytest.fixture(scope="module")
def experiment() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of experiments/, which may import its neighbours, and forgets them again."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module
    sys.path.remove(str(EXPERIMENTS))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EXPERIMENTS:
            del sys.modules[name]


@pytest.fixture
def command(experiment, monkeypatch, tmp_path) -> Callable[..., int]:
    """Runs a script of experiments/ on settings, and returns its exit code.

    What is None is left out of the settings; words come behind `--out` and `--jobs`, and `make` in
    the place of what makes a record.
    """

    def run(name, settings, *words, make, file="some.yaml"):
        script, path = experiment(name), tmp_path / file
        OmegaConf.save({k: v for k, v in settings.items() if v is not None}, path)
        out = ["--out", str(tmp_path / "out"), "--jobs", "1"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(path), *out, *words])
        monkeypatch.setattr(script, "make", make)
        return experiment("inputs").command(script.main)

    return run


@dataclass
class Searched:
    """Files of two experts of one base, and where their images are."""

    paths: list[Path]
    calibration: Calibration


@pytest.fixture(scope="session")
def searched(make_family, tmp_path_factory, tiny_suite):
    """Writes two experts whose heads know their tasks, and whose steps are random."""

    def make(spec: str) -> Searched:
        family = make_family(spec, length=0.03)
        suite, backbone = load_suite(tiny_suite), family.backbone.eval()
        for place, expert in enumerate(family.experts):
            data = suite.task(expert.name).load(SPLIT)
            head = fit_ncm(*features_of(backbone, data.train), len(data.classes))
            family.experts[place] = replace(expert, head=head)
        family.save(tmp_path_factory.mktemp("searched"))
        return Searched(family.paths, Calibration(suite=tiny_suite, options=SPLIT, images=40))

    return make


@pytest.fixture(scope="session")
def vits(searched) -> Searched:
    return searched("timm/test_vit@random:0")


@pytest.fixture(scope="session")
def resnets(searched) -> Searched:
    return searched("timm/test_resnet@random:0")


@pytest.fixture(scope="session")
def tiny_sweep(tiny_suite, tmp_path_factory) -> Path:
    """A YAML of `experiments/hyperparameters.py`: two rates of a ResNet, two step counts."""
    settings = {
        "suite": tiny_suite,
        "seeds": [0],
        "schedule": "constant",
        "warmup_steps": 0,
        "images": 16,
        "effort": {"micro_batches": 2, "batch": 8, "hessian_images": 8},
        "groups": {2: 1},
        "more_groups": {1: 2},
        "configurations": {
            "timm/test_resnet@random:0": [
                {"lr": 0.01, "batch": 8, "train_share": 1.0, "steps": [2, 4]},
                {"lr": 0.003},
            ]
        },
    }
    file = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    OmegaConf.save(settings, file)
    return file
