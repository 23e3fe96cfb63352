"""Tests of the comparison of methods in `experiments/methods.py`, and of its YAML files."""

from pathlib import Path
from typing import get_args

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import write_json
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.search.stations import Plan

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("methods_*.yaml"))


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("methods")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_is_a_method_with_a_configuration_that_it_takes(script, path):
    settings = OmegaConf.to_container(OmegaConf.load(path))
    rows = [script.row_of(entry) for entry in settings["rows"]]
    assert len({row.name for row in rows}) == len(rows) >= 30
    for row in rows:
        resolve(MERGE_METHODS.get(row.method), row.config)
    assert set(settings["experts"]) == {"steps", "lr", "batch", "warmup_steps"}


def test_rows_differ_in_their_statistics_alone(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "batch_norm_embedded8.yaml"))
    others = OmegaConf.to_container(OmegaConf.load(FOLDER / "methods_embedded8.yaml"))
    rows = [script.row_of(entry) for entry in settings["rows"]]
    assert len({row.name for row in rows}) == len(rows) == 2 * len(get_args(BatchNormPolicy))
    assert {row.batch_norm for row in rows} == set(get_args(BatchNormPolicy))
    # The experts are those of the other file.
    assert settings["experts"] == others["experts"]


def test_a_table_holds_means_and_students_intervals_over_seeds(script, tmp_path):
    plans = [plan(tmp_path, seed) for seed in (0, 1)]
    row = script.Row("mine", "ties", {})
    for found, accuracy in zip(plans, (0.4, 0.6), strict=True):
        reference = {"base": {"a": 0.2, "b": 0.2}, "experts": {"a": 0.8, "b": 1.0}}
        write_json(script.path_of(found, script.REFERENCE_ROW), {"test": reference})
        entry = {
            "config": {"scale": 0.5},
            "data": "none",
            "choice": {"0.5": 1.0},
            "accuracy": {"a": accuracy, "b": accuracy},
            "merge_cpu_seconds": 2.0,
        }
        write_json(script.path_of(found, row), entry)
    base, mine, experts = script.markdown(plans, [row]).splitlines()[2:]
    assert base.startswith("| base |")
    assert experts.startswith("| experts |")
    # 0.5 +- 12.706 * sqrt(0.02) / sqrt(2), of accuracies 0.4 and 0.6.
    cells = ["mine", "none", "0.5, 0.5", "0.500 [-0.771, 1.771]", "0.562 [-0.867, 1.992]", "2.0"]
    assert mine == f"| {' | '.join(cells)} |"


def plan(folder: Path, seed: int) -> Plan:
    return Plan(
        backbone="resnet",
        suite="embedded8",
        tasks=("a", "b"),
        out=folder / str(seed),
        seed=seed,
        steps=1,
        lr=0.1,
        batch=1,
        warmup_steps=0,
    )
