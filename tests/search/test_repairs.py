"""The experiment on repairs: what is merged how, and its tables."""

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import read_json

BACKBONE = "timm/test_resnet@random:0"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("repairs")


def test_every_repair_is_merged_and_the_table_compares_it_with_before(script):
    made = {
        name: (files, recipe)
        for name, files, recipe in script.repairs(
            ["a"], ["b"], {"shorter": ["c"], "distilled": ["d"]}, {"method": "average"}
        )
    }
    assert {name: files for name, (files, _) in made.items()} == {
        "alike": ["a"],
        "before": ["b"],
        "equal norms": ["b"],
        "shortest norm": ["b"],
        "travel": ["b"],
        "shorter": ["c"],
        "distilled": ["d"],
    }
    assert made["travel"][1].method == "travel_normalised"
    assert made["shortest norm"][1].veneers == (("equal_norms", {"to": "min"}),)
    rows = [
        {"case": "x", "method": "average", "repair": repair, "accuracy": a, "own": a}
        for repair, values in {"before": (0.5, 0.6), "shorter": (0.52, 0.64)}.items()
        for a in values
    ]
    assert "| x | average | shorter | 0.580 | +3.0 [" in script.table(rows)


@pytest.mark.slow
def test_a_case_is_measured_once(script, tiny_sweep, tmp_path):
    sweep = OmegaConf.to_container(OmegaConf.load(tiny_sweep))
    settings = {
        "groups": {2: 1},
        "odd": 1,
        "cases": {"longer": {"others": {"steps": 2}, "one": {"lr": 0.003, "steps": 4}}},
        "methods": [{"method": "average"}],
    }
    runs = script.runs_of(sweep, tmp_path / "experts")
    (case,) = script.cases_of(settings, runs, tmp_path / "out")
    record = script.make(case)
    rows = read_json(record)["metrics"]["rows"]
    assert [row["repair"] for row in rows] == [
        *("alike", "before", "equal norms", "shortest norm", "travel"),
        *("shorter", "distilled"),
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    before = record.read_bytes()
    assert script.make(case).read_bytes() == before
