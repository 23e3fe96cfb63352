"""The experiment on mixed experts runs on a tiny suite; falls are counted from uniform groups."""

import math
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import read_json

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("heterogeneous")


@pytest.fixture(scope="module")
def report(experiment):
    return experiment("heterogeneous_report")


def test_every_mix_is_of_experts_that_the_sweep_trains(script, experiment):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "heterogeneous.yaml"))
    sweep = OmegaConf.to_container(OmegaConf.load(FOLDER / settings["sweep"]))
    runs = experiment("hyperparameters").runs_of({**sweep, "seeds": [0]}, Path("out"))
    mixes = script.mixes_of(settings, runs, Path("out"))
    assert len({mix.record for mix in mixes}) == len(mixes) == 9
    for mix in mixes:
        first, second = mix.runs
        assert (first.name, mix.steps[0]) != (second.name, mix.steps[1])
    with pytest.raises(ValueError, match="must hold the configuration"):
        script.mixes_of({**settings, "mixes": {"vit": {"none": [{"steps": 7}] * 2}}}, runs, Path())


def test_falls_are_from_the_uniform_groups_and_ranked(report):
    rows = [
        {
            "backbone": "net",
            "seed": 0,
            "mix": "rates",
            "group": str(i),
            "swapped": False,
            "row": row,
            "accuracy": accuracy,
            "normalised_accuracy": 1.0,
            "test_loss": 1.0,
            "sum": 1.0,
            "chi2_lambda": 0.0,
            "chi2_w": float(i),
            "travel": -i,
            "ratio": 1.0,
        }
        for i in range(4)
        for row, accuracy in (("uniform", 0.8), ("average", 0.8 - 0.1 * i))
    ]
    found = [row["fall"] for row in report.with_falls(rows) if row["row"] == "average"]
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3])
    told = report.told(rows)
    # Of one seed there is no interval.
    assert "| rates | 0.800 | 1.500 | -15.0 (1.0) |" in told
    assert "| χ²_λ | constant | constant |" in told
    assert "| χ²_w | 1.00 (4) | 1.00 (4) |" in told
    assert "| mean travel (null) | -1.00 (4) |" in told
    # Seeds that agree have an interval without width; a divergence that is unknown is no rank.
    more = (
        rows
        + [row | {"seed": 1} for row in rows]
        + [rows[1] | {"chi2_w": math.nan, "row": "other"}]
    )
    told = report.told(more)
    assert (
        "| rates | 0.800 [0.800, 0.800] | 1.500 | -15.0 [-15.0, -15.0] (1.0) | +0.0 (1.0) |" in told
    )
    assert "| χ²_w | 1.00 (8) | 1.00 (8) |" in told
    assert "| longest over shortest τ (null) | constant | constant |" in told


@pytest.mark.slow
def test_mixes_become_tables(script, tiny_sweep, tmp_path, monkeypatch, capsys):
    rows = [
        "average",
        "task_arithmetic",
        {"row": "normalised", "method": "travel_normalised", "config": {"scale": 1.0}},
        {"row": "bound", "method": "bound_optimal", "config": {"micro_batches": 2, "images": 2}},
    ]
    settings = {
        "sweep": tiny_sweep.name,
        "groups": {2: 1},
        "mixes": {
            "timm/test_resnet@random:0": {
                "rates": [{"lr": 0.01, "steps": 4}, {"lr": 0.003, "steps": 4}]
            }
        },
        "rows": rows,
    }
    file = tiny_sweep.parent / "mixed.yaml"
    OmegaConf.save(settings, file)
    words = ["heterogeneous.py", str(file), "--out", str(tmp_path), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--experts", str(tiny_sweep.parent / "out")])
    script.main()
    told = capsys.readouterr().out
    (record,) = tmp_path.glob("*/rates.json")
    found = read_json(record)["metrics"]["rows"]
    names = ["uniform", "average", "task_arithmetic", "normalised", "bound"]
    assert [row["row"] for row in found] == 2 * names
    by_name = {row["row"]: row for row in found}
    # Travels of 10 to 3: w = 10/13 and 3/13; nothing diverges once they are made good.
    assert by_name["average"]["chi2_w"] == pytest.approx(0.4083, abs=1e-4)
    assert by_name["average"]["chi2_lambda"] == pytest.approx(0, abs=1e-12)
    assert by_name["normalised"]["chi2_w"] == pytest.approx(0, abs=1e-12)
    assert told.count("| rates |") == 1
    script.main()
    assert told.partition("###")[2] == capsys.readouterr().out.partition("###")[2]
