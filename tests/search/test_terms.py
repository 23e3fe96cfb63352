"""The experiment on terms measures every row on tiny experts, and marks what falls."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

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


@pytest.mark.slow
def test_methods_become_a_table(script, vits, tmp_path, monkeypatch, capsys):
    split = vits.calibration.options
    settings = {
        "suite": vits.calibration.suite,
        "backbones": ["vit"],
        "tasks": [path.stem for path in vits.paths],
        "experts": "{task}.safetensors",
        "steps": 4,
        "split": {"reserve": split.reserve, "val_share": split.val_share},
        "images": 16,
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
    assert by_name["ties"]["chi2 w"] == "(0.125)"
    script.main()
    assert capsys.readouterr().out.partition("###")[2] == table
    rows = (tmp_path / "out/terms_vit_4.csv").read_text("utf-8").splitlines()
    assert [row.partition(",")[0] for row in rows] == ["method", "average", "less", "ties"]
