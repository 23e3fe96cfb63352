"""Sweeps over merges and evaluations."""

import csv

import pytest
import yaml

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_merged

BASE = "timm/test_vit@random:0"


@pytest.fixture(scope="module")
def experts(make_family, tmp_path_factory) -> list[str]:
    return [str(path) for path in make_family(BASE).save(tmp_path_factory.mktemp("e")).paths]


@pytest.fixture
def sweep(tmp_path, tiny_suite):
    """Runs a sweep and returns exit code and rows of its table."""

    def run(*flags, **values):
        data = {"suite": tiny_suite, "reserve": 4, "val_share": 0.2}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "data": data, **values}))
        code = main(["sweep", str(path), "--jobs=1", *flags])
        table = tmp_path / "out" / "results.csv"
        text = table.read_text() if table.is_file() else ""
        return code, list(csv.DictReader(text.splitlines()))

    return run


def test_methods_with_parameters_of_their_own_are_merged_and_scored(sweep, experts, tmp_path):
    axes = [
        {"method": ["ties"], "density": [0.1, 0.5]},
        {"method": ["task_arithmetic", "average"]},
    ]
    code, rows = sweep("--score=val", job="merge", experts=experts, axes=axes)
    assert code == 0
    assert len(rows) == 4 * 3
    assert {row["split"] for row in rows} == {"val"}
    assert {(row["method"], row["density"]) for row in rows} == {
        ("ties", "0.1"),
        ("ties", "0.5"),
        ("task_arithmetic", ""),
        ("average", ""),
    }
    merged = load_merged(tmp_path / "out" / rows[0]["file"])
    assert merged.facts["method"] == rows[0]["method"]
    code, again = sweep(job="merge", experts=experts, axes=axes)
    assert code == 0
    assert len(again) == 4
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4


def test_models_are_evaluated(sweep, experts):
    axes = {"data.split": ["val", "test"], "models": [[experts[0]], experts]}
    code, rows = sweep(job="evaluate", axes=axes, batch_norm="stored")
    assert code == 0
    assert {row["split"] for row in rows} == {"val", "test"}
    assert {row["task"] for row in rows} == {"dots", "stripes", "(mean)"}


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"axes": {"method": ["tise"]}}, [], "No merge method named 'tise'. Did you mean 'ties'?"),
        ({"axes": {"method": ["ties"], "dens": [1]}}, [], "No parameter named 'dens'"),
        ({"axes": {"method": ["ties", "average"], "density": [1]}}, [], "named 'density'"),
        ({"axes": {"seed": [1]}, "data": {}}, ["--score=val"], "`data.suite` must name"),
        ({"axes": {"seed": [1]}, "job": "evaluate"}, ["--score=val"], "`score` must be left out"),
        ({"axes": {"seed": [1]}}, ["--score=vall"], "Did you mean 'val'?"),
    ],
)
def test_bad_input_is_one_line(sweep, experts, capsys, tmp_path, values, flags, message):
    job = values.get("job", "merge")
    models = {"models" if job == "evaluate" else "experts": experts}
    assert sweep(*flags, **{"job": "merge", **models, **values})[0] == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()
