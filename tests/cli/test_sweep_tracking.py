"""Sweeps that W&B is told of, and sweeps that its agents run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mergekit_lit.cli import main
from mergekit_lit.search.sweeping.launchers import wandb as launcher

BASE = "vit@random:0"


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def sweep_file(tiny_suite, tmp_path):
    def write(axes, **more) -> str:
        whole = {
            "out": str(tmp_path / "grid"),
            "jobs": 1,
            "data": {"suite": tiny_suite, "task": "dots", "reserve": 4},
            "model": {"base": BASE, "image_size": 8},
            "steps": 2,
            "axes": axes,
            **more,
        }
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump(whole))
        return str(path)

    return write


def run(*words) -> int:
    return main(["sweep", *map(str, words)])


@pytest.mark.slow
def test_runs_of_a_sweep_are_a_group_with_their_axes(sweep_file, tmp_path, offline_runs):
    axes = {"data.task": ["dots", "stripes"], "model.lr": [0.01], "seed": [3]}
    assert run(sweep_file(axes, logger="wandb")) == 0
    first, second, whole = offline_runs(tmp_path / "grid")
    assert first.run["display_name"] == "dots-step2 task=dots, lr=0.01, seed=3"
    for kept, task in ((first, "dots"), (second, "stripes")):
        assert kept.run["run_group"] == "grid"
        assert kept.run["job_type"] == "train"
        assert set(kept.run["tags"]) >= {"grid", "train", BASE}
        assert kept.config["axes"] == {"data.task": task, "model.lr": 0.01, "seed": 3}
        assert kept.config["seed"] == 3
    assert whole.run["run_group"] == "grid"
    assert whole.run["job_type"] == "sweep"
    assert (whole.summary["done"], whole.summary["failed"]) == (2, 0)
    assert set(whole.run["tags"]) >= {"grid", "sweep", "train", BASE}
    assert run(sweep_file(axes, logger="wandb"), "--retries=1") == 0
    *_, again = offline_runs(tmp_path / "grid")
    assert again.run["run_id"] == whole.run["run_id"]
    wide, *_ = tmp_path.rglob("by_task_*.table.json")
    columns = ["model.lr", "seed", "steps", "dots", "stripes"]
    assert json.loads(wide.read_text())["columns"] == columns


@pytest.mark.slow
def test_a_sweep_over_merges_tells_methods_by_tasks(
    make_family, tiny_suite, tmp_path, offline_runs
):
    family = make_family(BASE, image_size=8).save(tmp_path)
    whole = {
        "job": "merge",
        "out": str(tmp_path / "merges"),
        "jobs": 1,
        "experts": [str(path) for path in family.paths],
        "score": "val",
        "data": {"suite": tiny_suite, "reserve": 4},
        "axes": {"method": ["average", "ties"]},
        "logger": "wandb",
    }
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(whole))
    assert run(tmp_path / "file.yaml") == 0
    *runs, told = offline_runs(tmp_path / "merges")
    assert {kept.run["run_group"] for kept in runs} == {"merges"}
    assert sorted(kept.run["job_type"] for kept in runs) == 2 * ["evaluate"] + 2 * ["merge"]
    assert {kept.config["axes"]["method"] for kept in runs} == {"average", "ties"}
    assert [kept.used() for kept in runs if kept.run["job_type"] == "evaluate"] == 2 * [
        ["merged-merged"]
    ]
    (wide,) = tmp_path.rglob("by_task_*.table.json")
    table = json.loads(wide.read_text())
    assert table["columns"] == ["method", "model", "dots", "stripes", "(mean)"]
    assert [row[0] for row in table["data"]] == ["average", "ties"]
    assert told.run["job_type"] == "sweep"


def agents_command(path, name):
    """Return what an agent of W&B makes of the file's command for one value of `run`."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    definition = yaml.safe_load(path.read_text())
    assert definition["method"] == "grid"
    assert name in definition["parameters"]["run"]["values"]
    given = create_sweep_command_args({"args": {"run": {"value": name}}})
    given |= {"env": ["/usr/bin/env"]}
    command = create_sweep_command(definition["command"])
    return [w for part in command for w in (given[part[2:-1]] if part[:2] == "${" else [part])]


@pytest.mark.slow
def test_without_a_key_the_file_is_written_and_its_command_does_a_run(
    sweep_file, tmp_path, capsys, monkeypatch, offline_runs
):
    monkeypatch.setenv("WANDB_MODE", "online")
    words = [sweep_file({"model.lr": [0.01, 0.02]}), "--launcher=wandb"]
    assert run(*words) == 2
    told = capsys.readouterr().err
    path = tmp_path / "grid" / launcher.FILE
    assert told.count("\n") == 1
    assert "but there is no API key" in told
    assert f"`wandb sweep {path}` and then `wandb agent SWEEP_ID`" in told
    names = yaml.safe_load(path.read_text())["parameters"]["run"]["values"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = agents_command(path, names[0])
    assert command[:3] == ["/usr/bin/env", "mergekit-lit", "sweep"]
    assert main(command[2:]) == 0
    assert [each.parent.name for each in (tmp_path / "grid").rglob("dots*.safetensors")] == [
        names[0]
    ]
    # Another agent that is given the same run finds it done.
    assert main(command[2:]) == 0
    (kept,) = offline_runs(tmp_path / "grid")
    assert kept.run["run_group"] == "grid"
    assert run(*words) == 2
    assert yaml.safe_load(path.read_text())["parameters"]["run"]["values"] == names[1:]


def test_offline_is_told_too(sweep_file, tmp_path, capsys):
    assert run(sweep_file({"model.lr": [0.01]}), "--launcher=wandb") == 2
    assert "but WANDB_MODE says otherwise" in capsys.readouterr().err
    assert (tmp_path / "grid" / launcher.FILE).is_file()


AGENT = """
import subprocess, sys, yaml
from pathlib import Path

definition = yaml.safe_load(Path(sys.argv[1]).read_text())
ours = definition["command"][1:-1]
for name in definition["parameters"]["run"]["values"]:
    command = [sys.executable, "-m", "mergekit_lit", *ours[1:], "--logger=csv", f"--run={name}"]
    subprocess.run(command, check=True)
"""


@pytest.mark.slow
def test_agents_are_started_and_their_runs_are_the_sweep_s(
    sweep_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    given, kept = {}, []

    def register(definition, **where):
        given.update(definition, where=where)
        return "abc123"

    def start(command, env):
        kept.append((command, env["WANDB_DIR"]))
        agent = [sys.executable, "-c", AGENT, str(tmp_path / "grid" / launcher.FILE)]
        return subprocess.Popen(agent, env={**os.environ, "WANDB_MODE": "offline"})

    monkeypatch.setattr("wandb.sweep", register)
    popen = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(launcher, "subprocess", popen)
    monkeypatch.setattr("mergekit_lit.search.sweeping.sweep.log_sweep", lambda *_: None)
    file = sweep_file({"model.lr": [0.01]}, launcher_options={"entity": "us", "project": "p"})
    assert run(file, "--launcher=wandb") == 0
    assert "1 of 1 runs are done" in capsys.readouterr().out
    ((command, folder),) = kept
    assert command[1:] == ["-m", "wandb", "agent", "--forward-signals", "us/p/abc123"]
    assert Path(folder) == tmp_path / "grid"
    assert given["where"] == {"entity": "us", "project": "p"}
    # There is nothing left to ask agents for.
    assert run(file, "--launcher=wandb") == 0
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("more", "words", "message"),
    [
        ({}, ["--run=abc"], "`run` must name one of the sweep's 1 runs, but is 'abc'"),
        ({"launcher_options": {"entiti": "x"}}, [], "Did you mean 'entity'"),
        ({"optuna": {"metric": "val_loss"}}, [], "`optuna` must be left out"),
    ],
)
def test_what_agents_cannot_do_is_told(sweep_file, tmp_path, capsys, more, words, message):
    axes = {"model.lr": {"optuna": {"low": 0.1, "high": 0.2}} if "optuna" in more else [0.01]}
    assert run(sweep_file(axes, **more), "--launcher=wandb", *words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "grid").exists()
