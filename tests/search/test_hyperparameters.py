"""The sweep over hyperparameters runs on a tiny suite, goes on where it stopped, and is a table."""

import csv
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.data.suites import load_suite

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("hyperparameters")


@pytest.fixture(scope="module")
def testbed(experiment):
    return experiment("testbed")


def test_groups_are_those_that_the_source_draws(testbed):
    tasks = list("abcdefgh")
    found = testbed.groups_of(tasks, 6, 10)
    for seed in range(3):
        random.seed(seed)
        assert set(random.sample(tasks, 6)) in [set(group) for group in found]
    assert len({frozenset(group) for group in found}) == len(found) == 10
    assert len(testbed.groups_of(tasks, 8, 5)) == 1


def test_the_file_varies_one_factor_at_a_time(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "hyperparameters.yaml"))
    runs = script.runs_of({**settings, "seeds": [0]}, Path("out"))
    assert len({(run.backbone, run.name) for run in runs}) == len(runs)
    centre, *others = [run for run in runs if run.backbone == "resnet"]
    factors = ("lr", "batch", "train_share")
    for run in others:
        assert sum(getattr(run, name) != getattr(centre, name) for name in factors) == 1
    assert {len(group) for group in centre.groups} == {2, 4, 6, 8}
    assert {len(group) for run in others for group in run.groups} == {6}
    assert centre.tasks == load_suite("embedded8").names


@pytest.mark.slow
def test_runs_become_a_table(script, tiny_sweep, monkeypatch, capsys):
    out = tiny_sweep.parent / "out"
    words = ["hyperparameters.py", str(tiny_sweep), "--out", str(out), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    assert capsys.readouterr().out.count("hyperparameters.json") == 2
    table = out / "tiny.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    # At the centre one group of two tasks and two of one, else the first alone; two step counts.
    assert [(row["lr"], row["steps"], row["size"]) for row in rows] == [
        (lr, steps, size)
        for lr, sizes in (("0.01", "211"), ("0.003", "2"))
        for steps in "24"
        for size in sizes
    ]
    for row in rows:
        known = {name: float(row[name]) for name in ("gap", "test_loss", "train_loss")}
        assert known["gap"] == pytest.approx(known["test_loss"] - known["train_loss"], abs=1e-4)
        assert float(row["eps_path"]) > 0
        assert float(row["total_path"]) > 0
        if row["size"] == "1":
            # A merge of one expert is the expert.
            assert row["test_loss"] == pytest.approx(row["experts_test_loss"], abs=1e-4)
    text = table.read_text()
    script.main()
    assert "hyperparameters.json" not in capsys.readouterr().out
    assert table.read_text() == text


@pytest.mark.slow
def test_each_length_of_a_cosine_is_a_training_of_its_own(script, tiny_sweep, tmp_path):
    settings = {**OmegaConf.to_container(OmegaConf.load(tiny_sweep)), "schedule": "cosine"}
    run, _ = script.runs_of(settings, tmp_path)
    run = replace(run, tasks=run.tasks[:1])
    found = script.experts_of(run)
    cards = {steps: load_expert(path).card for steps, (path,) in found.items()}
    assert [card.schedule_steps for card in cards.values()] == list(found) == [2, 4]
