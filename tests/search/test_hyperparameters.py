"""The sweep over hyperparameters runs on a tiny suite, goes on where it stopped, and is a table."""

import csv
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.records import Record
from mergekit_lit.data.suites import load_suite

FOLDER = Path(__file__).parents[2] / "experiments"
CENTRE = {"lr": 0.01, "batch": 8, "train_share": 1.0, "steps": [2]}


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


@pytest.fixture
def call(command):
    """Runs the command on settings; every record that is to be made is one row of its run."""

    def make(run):
        rows = [{"backbone": run.backbone, "seed": run.seed, "lr": run.lr}]
        config = {"config": run.config, "metrics": {"rows": rows}}
        Record(stage="hyperparameters", name=run.name, **config).write(run.record)
        return run.record

    return partial(command, "hyperparameters", make=make)


def test_the_table_holds_every_finished_run_in_a_stable_order(call, tiny_sweep, tmp_path):
    settings = OmegaConf.to_container(OmegaConf.load(tiny_sweep))
    table = tmp_path / "out/some.csv"
    for seed in "102":
        assert call(settings, "--seeds", seed) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    # The file's own seed first; of seed 1 the records are there, but nobody asks for them.
    told = [(row["seed"], row["lr"]) for row in rows]
    assert told == [(seed, lr) for seed in "02" for lr in ("0.01", "0.003")]
    assert call({**settings, "seeds": [0, 1, 2]}, "--seeds", "1") == 0
    assert len(list(csv.DictReader(table.read_text().splitlines()))) == 6


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"images": 8}, "`images` (16 there, 8 now). Choose another --out."),
        ({"groups": {2: 1, 1: 1}}, "`groups` ("),
        ({"effort": {"micro_batches": 4, "batch": 8}}, "`effort.micro_batches` (2 there, 4 now)"),
    ],
)
def test_records_of_other_settings_are_refused(call, tiny_sweep, tmp_path, capsys, changed, told):
    settings = OmegaConf.to_container(OmegaConf.load(tiny_sweep))
    assert call(settings) == 0
    before = (tmp_path / "out/some.csv").read_bytes()
    # For another seed too, whose rows would stand in the same table.
    assert call({**settings, **changed}, "--seeds", "5") == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "out/some.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({"schedule": "cosin"}, [], "No schedule named 'cosin'. Did you mean 'cosine'?"),
        ({"imagess": 3}, [], "named 'imagess'. Did you mean 'images'?"),
        ({"tasks": ["dotts"]}, [], "named 'dotts'. Did you mean 'dots'?"),
        ({"suite": "embedded9"}, [], "No suite named 'embedded9'. Did you mean 'embedded8'?"),
        ({"warmup_steps": 4}, [], "`warmup_steps` must be less than the steps of a training, 4"),
        ({"groups": {3: 1}}, [], "A group must hold at most 2 tasks, but `groups` says 3."),
        ({"effort": {"batches": 3}}, [], "No key of `effort` named 'batches'."),
        ({"configurations": {"vit": []}}, [], "must be a list of one entry or more"),
        ({"configurations": {"vit": [{"lr": 1}]}}, [], "must give `batch`"),
        ({"configurations": {"vitt": [CENTRE]}}, [], "No "),
        ({"configurations": {"vit": [CENTRE, {"lrr": 1}]}}, [], "Did you mean 'lr'?"),
        ({}, ["--backbones", "vitt"], "named 'vitt'. Known: timm/test_resnet@random:0."),
    ],
)
def test_wrong_input_is_refused_before_any_training(
    call, tiny_sweep, tmp_path, capsys, changed, words, told
):
    settings = OmegaConf.to_container(OmegaConf.load(tiny_sweep))
    assert call({**settings, **changed}, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hyperparameters.py: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_what_a_card_does_not_tell_is_no_zero(script, make_experts):
    experts = make_experts(2)
    assert script.path_of(experts)["travel"] == 1.5
    experts = replace(experts, cards=[experts.cards[0], replace(experts.cards[1], travel=None)])
    found = script.path_of(experts)
    assert {found[name] for name in ("travel", "noise", "eps_path", "n", "displacement")} == {None}


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
