"""The experiment on recommendations: its groups, random search, and its table."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import read_json

FOLDER = Path(__file__).parents[2] / "experiments"
BACKBONE = "timm/test_vit@random:0"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("recommendation")


@pytest.fixture
def settings():
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "recommendation.yaml"))


def test_the_studies_are_cells_of_the_benchmark_of_merges(script, settings):
    found = list(script.studies(settings, FOLDER, Path("merges"), Path("out")))
    assert [(each.pool.backbone, each.pool.name) for each in found] == [
        ("resnet", "embedded"),
        ("vit", "embedded"),
    ]
    for study in found:
        trainings = {tuple(own): steps for *own, steps in study.pool.trainings}
        assert all(c.steps in trainings[c.lr, c.batch, c.n] for c in study.cells)
        assert study.space.candidates[0].way.batch == 32
    groups = script.groups(found[0].pool.tasks, settings)
    assert groups == script.groups(found[1].pool.tasks, settings)
    assert all(len(set(group)) == 6 for group in groups)


def test_random_search_takes_the_best_on_val_of_what_it_pays_for(script, settings):
    study = next(script.studies(settings, FOLDER, Path("merges"), Path("out")))
    val = {cell: float(place) for place, cell in enumerate(study.cells)}
    test = {cell: 1.0 - place / 10 for place, cell in enumerate(study.cells)}
    every = sum(cell.steps for cell in study.cells)
    assert script.by_chance(study, val, test, every) == 1.0
    few = script.by_chance(study, val, test, 25)
    assert min(test.values()) < few < 1.0


def test_the_table_tells_regrets_in_points(script):
    row = {
        "backbone": "vit",
        "pool": "real",
        "best": 0.8,
        "base": 0.6,
        "recommended": 0.79,
        "default": 0.75,
        "random": 0.77,
        "longest": 0.7,
        "mean_cell": 0.72,
        "expected": {"low": 0.7, "high": 0.9},
    }
    assert "| vit | real | 1 | 0.800 | 0.600 | 1.0 | 0 of 1 | 5.0 | 3.0 |" in script.table([row])


@pytest.mark.slow
def test_one_group_is_compared(script, tiny_suite, tmp_path):
    plan = {
        "seed": 0,
        "backbones": [BACKBONE],
        "pools": {
            "embedded": {
                "suite": tiny_suite,
                "sizes": [2],
                "each": 1,
                "configurations": [
                    {"lr": lr, "batch": 8, "n": 40, "steps": [16, 24]} for lr in (0.01, 0.03)
                ],
            }
        },
        "schedule": "constant",
        "warmup_steps": 0,
        "test_images": 20,
        "val_images": 10,
        "always": [{"method": "average"}],
        "drawn": 0,
        "methods": [{"method": "ties"}],
        "effort": {"micro_batches": 2, "batch": 8, "hessian_images": 4, "images": 8},
    }
    settings = {
        "merges": "merges.yaml",
        "pools": {"embedded": {"batch": 8, "n": 40, "lr": [0.01, 0.03], "steps": [16, 24]}},
        "groups": 1,
        "size": 2,
        "seed": 0,
        "budget": 7.0,
        "ways": 2,
        "probe_share": 0.2,
        "default": {"lr": 0.01, "steps": 20},
        "test_images": 20,
    }
    OmegaConf.save(plan, tmp_path / "merges.yaml")
    (study,) = script.studies(settings, tmp_path, tmp_path / "merges", tmp_path / "out")
    (group,) = script.groups(study.pool.tasks, settings)
    (row,) = read_json(script.compared(study, group))["metrics"]["rows"]
    assert len(row["cells"]) == 4
    assert row["best"] == max(row["cells"].values())
    assert row["recommended"] == row["cells"][row["chosen"]]
    assert script.is_there(study, group)
