"""The experiment on terms measures every row on tiny experts, and marks what falls."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import resolve

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("terms")


def test_every_row_is_a_method_with_a_configuration_that_it_takes(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "terms.yaml"))
    jobs = script.jobs_of(settings, "vit", Path("runs"), Path("out"))
    assert len({job.record for job in jobs}) == len(jobs) > 10
    assert jobs[0].row.name == "average"
    for job in jobs:
        resolve(MERGE_METHODS.get(job.row.method), job.row.config)
    assert jobs[0].experts[0] == Path("runs/vit/mnist-lr0.003-b32-0/mnist-step200.safetensors")


@pytest.mark.parametrize(
    ("value", "average", "told"),
    [(1.0, 1.02, "1"), (1.0, 1.2, "1 ↓"), (1.0, 0.8, "1 ↑"), (-2.0, -1.0, "-2 ↓")],
)
def test_what_falls_by_more_than_a_twentieth_is_marked(script, value, average, told):
    assert script.marked(value, average) == told


def test_what_is_no_number_is_told_in_words(script):
    assert script.marked("vacuous", 1.0) == "vacuous"
    assert script.marked(1.0, "unknown") == "1"


@pytest.fixture
def settings(vits):
    split = vits.calibration.options
    return {
        "suite": vits.calibration.suite,
        "backbones": ["vit"],
        "tasks": [path.stem for path in vits.paths],
        "experts": "{task}.safetensors",
        "steps": 4,
        "split": {"reserve": split.reserve, "val_share": split.val_share},
        "images": 16,
        "effort": {"micro_batches": 2},
        "rows": ["average", "ties"],
    }


@pytest.fixture
def call(command, settings, vits):
    """Runs the command on changed settings, with nothing that makes a record."""

    def make(job):
        pytest.fail(f"{job} was made")

    def run(changed, *words):
        words = ["--experts", str(vits.paths[0].parent), *words]
        return command("terms", {**settings, **changed}, *words, make=make, file="tiny.yaml")

    return run


@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({"rows": ["average", "tiess"]}, [], "No merge method named 'tiess'. Did you mean 'ties'?"),
        ({"rows": ["ties"]}, [], "must hold `average`"),
        ({"rows": ["average", "ties", "ties"]}, [], "must have a name each"),
        ({}, ["--rows", "tiess"], "named 'tiess'. Did you mean 'ties'?"),
        ({}, ["--experts", "none"], "No file 'none/dots.safetensors'. Train it, or give"),
        ({"experts": "{where}.safetensors"}, [], "`experts` must name places by {backbone}"),
        ({"split": {"reserv": 3}}, [], "No key of `split` named 'reserv'. Did you mean"),
        ({"steps": 0}, [], "`steps` of "),
        ({"tasks": ["dotts"]}, [], "named 'dotts'. Did you mean 'dots'?"),
    ],
)
def test_wrong_input_is_refused_before_any_merge(call, tmp_path, capsys, changed, words, told):
    assert call(changed, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("terms.py: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"effort": {"micro_batches": 3}}, "`effort.micro_batches` (2 there, 3 now)"),
        ({"split": {"seed": 1}}, "`calibration.options.reserve` ("),
        ({"experts": "{task}.pt"}, "must be a record of "),
    ],
)
def test_a_record_of_other_settings_is_refused(call, script, vits, tmp_path, capsys, changed, told):
    assert call({}, "--experts", "none") == 2
    settings = OmegaConf.to_container(OmegaConf.load(tmp_path / "tiny.yaml"))
    folder = vits.paths[0].parent
    for job in script.jobs_of(settings, "vit", folder, tmp_path / "out"):
        config = {
            "experts": [str(path) for path in job.experts],
            "recipe": asdict(job.recipe),
            "calibration": asdict(job.calibration),
            "effort": asdict(job.effort),
        }
        Record(stage="bound", name=job.row.name, config=config).write(job.record)
    capsys.readouterr()
    assert call(changed) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_methods_become_a_table(script, settings, vits, tmp_path, monkeypatch, capsys):
    settings = {
        **settings,
        "effort": {"micro_batches": 2, "batch": 4, "hessian_images": 2, "lanczos_steps": 1},
        "rows": [
            "average",
            {"row": "less", "method": "task_arithmetic", "config": {"scale": 0.1}},
            "ties",
        ],
    }
    file = tmp_path / "tiny.yaml"
    OmegaConf.save(settings, file)
    words = ["terms.py", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--experts", str(vits.paths[0].parent)])
    script.main()
    table = capsys.readouterr().out.partition("###")[2]
    head, _, average, less, ties = table.strip().splitlines()[2:]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    by_name = {
        row: dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        for row, line in (("average", average), ("less", less), ("ties", ties))
    }
    assert by_name["average"]["chi2 lambda"] == "0"
    # Travels of 1 and 2, in equal parts: w = 1/3 and 2/3.
    assert float(by_name["average"]["chi2 w"]) == pytest.approx(0.125, abs=1e-3)
    assert "↓" not in average
    assert by_name["average"]["delta2"] == "unknown"
    assert by_name["ties"]["chi2 w"] == "unknown"
    script.main()
    assert capsys.readouterr().out.partition("###")[2] == table
    # One row is compared with the average, whether named or not, and leaves the others' numbers.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "ties"])
    script.main()
    again = capsys.readouterr().out.partition("###")[2].strip().splitlines()
    assert again[4:] == [average, ties]
    rows = (tmp_path / "out/terms_vit_4.csv").read_text("utf-8").splitlines()
    assert [row.partition(",")[0] for row in rows] == ["method", "average", "less", "ties"]
