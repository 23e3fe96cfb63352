"""The experiment on mixed experts runs on a tiny suite; falls are counted from uniform groups."""

import math
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import read_json
from mergekit_lit.core.records import Record

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


def test_falls_that_are_equal_but_for_rounding_are_ties(report):
    def row(place, uniform, average):
        about = {"backbone": "net", "seed": 0, "mix": "rates", "group": place, "swapped": False}
        shared = {**about, "chi2_w": float(place)}
        accuracies = {"uniform": uniform, "average": average}
        return [{**shared, "row": name, "accuracy": found} for name, found in accuracies.items()]

    # All fall by a tenth, to the last digit or nearly so.
    pairs = enumerate([(0.4, 0.3), (0.3, 0.2), (0.8, 0.7), (0.9, 0.8)])
    rows = report.with_falls([each for place, pair in pairs for each in row(place, *pair)])
    falls = [each for each in rows if each["row"] == "average"]
    assert len({each["fall"] for each in falls}) > 1
    assert report._rank(falls, "chi2_w") == "constant"


SPEC = "timm/test_resnet@random:0"
HALVES = [{"lr": 0.01, "steps": 4}, {"lr": 0.003, "steps": 4}]


@pytest.fixture
def call(command, tiny_sweep):
    """Runs the command on changed settings; every record that is to be made is two rows."""

    def make(mix):
        run = mix.runs[0]
        shared = {"backbone": run.backbone, "seed": run.seed, "mix": mix.name, "group": "a+b"}
        shared |= {"swapped": False, "accuracy": 0.5, "sum": 1.0, "chi2_lambda": 0.0}
        shared |= {"chi2_w": 0.0, "travel": 1.0, "ratio": 1.0}
        rows = [{**shared, "row": row} for row in ("uniform", "average")]
        config = {"config": mix.config, "metrics": {"rows": rows}}
        Record(stage="heterogeneous", name=mix.name, **config).write(mix.record)
        return mix.record

    def run(changed, *words):
        settings = {"sweep": str(tiny_sweep), "groups": {2: 1}, "rows": ["average"]}
        settings |= {"mixes": {SPEC: {"rates": HALVES}}, **changed}
        return command("heterogeneous", settings, *words, make=make, file="mixed.yaml")

    return run


def test_the_table_holds_the_seeds_of_the_sweep_and_those_given(call, tmp_path, report, capsys):
    for seed in "20":
        assert call({}, "--seeds", seed) == 0
    assert call({}, "--seeds", "2") == 0
    rows = report.read(tmp_path / "out/mixed.csv")
    assert [row["seed"] for row in rows] == [0, 0, 2, 2]
    assert capsys.readouterr().err == ""
    assert call({"rows": ["ties"]}, "--seeds", "2") == 2
    assert "`rows.0.method` ('average' there, 'ties' now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({"sweep": "none.yaml"}, [], "No file "),
        ({"rows": None}, [], "must give `rows`"),
        ({"rows": ["averag"]}, [], "No merge method named 'averag'. Did you mean 'average'?"),
        ({"rows": [{"method": "ties"}]}, [], "must give `row`"),
        (
            {"rows": [{"row": "x", "method": "ties", "config": {"densty": 1}}]},
            [],
            "Did you mean 'density'?",
        ),
        ({"rows": [{"row": "x", "method": "ties", "batch_norm": "bas"}]}, [], "mean 'base'?"),
        ({"mixes": {"vit": {"x": HALVES}}}, [], "No backbone of the sweep named 'vit'."),
        ({"mixes": {SPEC: {"x": HALVES[:1]}}}, [], "must list two configurations"),
        ({"mixes": {SPEC: {"x": [{"lr": 0.01}] * 2}}}, [], "must give `steps`"),
        ({"mixes": {SPEC: {"x": [{"steps": 7}] * 2}}}, [], "must hold the configuration"),
        ({"groups": {3: 1}}, [], "A group must hold at most 2 tasks"),
        ({}, ["--backbones", "resnt"], "named 'resnt'."),
    ],
)
def test_wrong_input_is_refused_before_any_training(call, tmp_path, capsys, changed, words, told):
    assert call(changed, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("heterogeneous.py: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


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
