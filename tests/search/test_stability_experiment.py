"""The stability experiment runs on a tiny suite, goes on where it stopped, and tells its tables."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("stability")


def test_the_file_covers_below_one_epoch_and_many(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "stability.yaml"))
    runs = list(script.runs_of(settings, "vit", Path("out")))
    assert len(runs) == len(settings["tasks"]) * len(settings["configurations"])
    assert len({run.name for run in runs}) == len(runs)
    assert min(settings["steps"]) * 32 < 1376 < max(settings["steps"]) * 32 / 10


@pytest.mark.slow
def test_runs_become_tables(script, tiny_suite, tmp_path, monkeypatch, capsys):
    settings = {
        "suite": tiny_suite,
        "backbones": ["vit@random:0"],
        "tasks": ["dots"],
        "seeds": [0],
        "steps": [3, 6, 9],
        "twins": 2,
        "replaced": [1, 4],
        "configurations": [{"lr": 0.01, "batch": 8}, {"lr": 0.003, "batch": 8}],
    }
    file = tmp_path / "tiny.yaml"
    OmegaConf.save(settings, file)
    words = ["stability.py", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    first = capsys.readouterr().out
    assert first.count("| dots-lr") == 6
    assert "| eps_path |" in first
    script.main()
    # Nothing is made again: the paths of what is made are not told.
    assert capsys.readouterr().out == first.partition("\n###")[1] + first.partition("\n###")[2]
