import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from lightning.pytorch.loggers import WandbLogger

from mergekit_lit.lit.loggers import (
    FileLogger,
    RunLogger,
    log_failure,
    log_outcome,
    make_loggers,
)
from mergekit_lit.lit.run_facts import Outcome, RunFacts, TrackedModel, file_model
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.lit.wandb_runs import kept_run_id, wandb_key

MNIST = RunFacts(name="mnist")


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    # What make_loggers sets is put back, too.
    for name in ("WANDB_SILENT", "WANDB_CONSOLE"):
        monkeypatch.setenv(name, os.environ.get(name, "off" if name.endswith("E") else "true"))


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_files_hold_every_row(tmp_path):
    logger = FileLogger(tmp_path / "logs")
    logger.log_metrics({"loss": 1.5}, step=9)
    assert lines_of(tmp_path / "logs") == [{"step": 9, "loss": 1.5}]
    logger.log_metrics({"loss": 0.5, "gradient/norm": float("nan")}, step=19)
    logger.finalize("success")
    assert lines_of(tmp_path / "logs")[1] == {"step": 19, "loss": 0.5, "gradient/norm": None}
    assert rows_of(tmp_path / "logs") == [
        {"step": "9", "loss": "1.5", "gradient/norm": ""},
        {"step": "19", "loss": "0.5", "gradient/norm": ""},
    ]


def test_nothing_is_written_before_the_first_row(tmp_path):
    logger = FileLogger(tmp_path / "logs")
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "logs").exists()


def test_a_resumed_run_writes_again_from_its_step(tmp_path):
    killed = FileLogger(tmp_path)
    for step in (9, 19, 29):
        killed.log_metrics({"loss": 1.0}, step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    resumed = FileLogger(tmp_path)
    resumed.log_metrics({"loss": 2.0}, step=19)
    resumed.log_metrics({"loss": 2.0}, step=29)
    resumed.save()
    assert [(row["step"], row["loss"]) for row in lines_of(tmp_path)] == [(9, 1), (19, 2), (29, 2)]
    assert len(rows_of(tmp_path)) == 3


def test_a_fresh_run_replaces_an_old_one(tmp_path):
    FileLogger(tmp_path).log_metrics({"loss": 1.0}, step=50)
    FileLogger(tmp_path).log_metrics({"loss": 1.0}, step=0)
    assert [row["step"] for row in lines_of(tmp_path)] == [0]


def test_csv_needs_no_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (logger,) = make_loggers("csv", tmp_path, MNIST)
    assert isinstance(logger, FileLogger)


@pytest.mark.parametrize(
    ("kind", "environment"), [("wandb-online", {}), ("wandb", {"WANDB_MODE": "online"})]
)
def test_online_without_a_key_is_told_and_never_asked(tmp_path, monkeypatch, kind, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="must find an API key") as caught:
        make_loggers(kind, tmp_path, MNIST)
    assert "\n" not in str(caught.value)


def test_an_unknown_logger_is_told(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        make_loggers("wanbd", tmp_path, MNIST)


def test_a_key_is_found_where_wandb_login_leaves_it(tmp_path, monkeypatch):
    assert not wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert wandb_key()
    (tmp_path / "netrc").write_text("nonsense")
    assert not wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_key()


def test_wandb_is_offline_unless_asked_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, logger = make_loggers("wandb", tmp_path, MNIST)
    assert isinstance(logger, WandbLogger)
    assert logger._offline
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("kind", "folder", "message"),
    [
        ("wandb", None, "`logger` 'wandb' must be told a folder for its files"),
        ("wandb-online", "here", "must find an API key"),
        ("tensorbord", "here", "No logger named 'tensorbord'. Did you mean 'tensorboard'"),
    ],
)
def test_a_logger_is_refused_before_any_work(tmp_path, kind, folder, message):
    with pytest.raises(ValueError, match=message):
        check_logger(kind, folder and tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


def test_csv_tells_wandb_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_run("csv", tmp_path / "logs", MNIST, Outcome(summary={}))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_lit.lit.tensorboard_runs.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mergekit-lit\[tensorboard\]'"):
        make_loggers("tensorboard", tmp_path, MNIST)


def test_a_run_goes_on_under_its_name_and_a_new_one_has_another(tmp_path):
    other = RunFacts(name="mnist", config={"lr": 0.2})
    first = kept_run_id(tmp_path, MNIST, resume=False)
    assert kept_run_id(tmp_path, MNIST, resume=True) == first
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert kept_run_id(moved, MNIST, resume=True) == first
    ids = [kept_run_id(moved, facts, resume=True) for facts in (other, MNIST)]
    ids.append(kept_run_id(moved, MNIST, resume=False))
    assert len({first, *ids}) == 4
    assert kept_run_id(tmp_path, MNIST, resume=False) == first


@pytest.mark.slow
def test_an_offline_run_keeps_everything_where_wandb_finds_it(tmp_path, offline_runs):
    expert = tmp_path / "two tasks, tuned.safetensors"
    expert.write_bytes(b"bytes")
    facts = RunFacts(
        name="mnist",
        job="train",
        group="demo",
        tags=["embedded8", "a" * 99, "", "embedded8"],
        config={"lr": 0.1, "data": {"task": "mnist"}},
    )
    loggers = make_loggers("wandb", tmp_path / "logs", facts)
    loggers[1].experiment.log({"mine": 1})
    for step in (0, 4):
        for logger in loggers:
            logger.log_metrics({"loss": 1.0 / (step + 1), "nan": float("nan")}, step=step)
    base = TrackedModel(name="vit@random:0", kind="base", facts={"content": "ab"})
    outcome = Outcome(
        summary={"val_loss": 1.0},
        config={"steps": 5},
        tables={"scores": [{"task": "mnist", "accuracy": 0.5}, {"task": "x", "accuracy": None}]},
        used=[base],
        made=[file_model(expert, "expert", {"lr": 0.1})],
    )
    log_outcome(loggers, outcome)
    (kept,) = offline_runs(tmp_path)
    assert kept.run["display_name"] == "mnist"
    assert kept.run["run_group"] == "demo"
    assert kept.run["job_type"] == "train"
    assert kept.run["tags"] == ["embedded8", "a" * 64, "train"]
    assert (kept.config["lr"], kept.config["steps"]) == (0.1, 5)
    assert kept.config["data"] == {"task": "mnist"}
    assert kept.summary["val_loss"] == 1
    # A row of somebody else's without a step moves W&B's own on, and nothing is lost.
    assert [row["_step"] for row in kept.history] == [0, 1, 4, 5]
    assert [row["loss"] for row in kept.history if "loss" in row] == [1, 0.2]
    assert [row["trainer/global_step"] for row in kept.history[1:3]] == [0, 4]
    assert kept.history[-1]["scores.nrows"] == 2
    assert (kept.used(), kept.made()) == (["base-vit-random-0"], ["expert-two-tasks--tuned"])
    made = kept.artifact("expert-two-tasks--tuned")
    (content,) = made["manifest"]["contents"]
    assert content["local_path"] == str(expert.resolve())
    told = json.loads(made["metadata"])
    assert told["made_from"] == {"base-vit@random:0": "ab"}
    assert told["content"] == hashlib.sha256(b"bytes").hexdigest()
    assert kept.exit_code == 0
    assert lines_of(tmp_path / "logs")[0]["loss"] == 1


@pytest.mark.slow
def test_an_ended_run_is_told_at_once_and_leaves_the_caller_s_open(tmp_path, offline_runs):
    import wandb

    facts = RunFacts(name="ties", job="merge")
    own = wandb.init(dir=tmp_path / "own", name="own", mode="offline")
    log_run("wandb", tmp_path / "logs", facts, Outcome(summary={"method": "ties"}))
    assert wandb.run is own
    own.finish()
    (kept,) = offline_runs(tmp_path / "logs")
    assert kept.summary["method"] == "ties"


KILLED = """
import os, signal, sys
from pathlib import Path
from mergekit_lit.lit.loggers import make_loggers
from mergekit_lit.lit.run_facts import RunFacts

loggers = make_loggers("wandb", Path(sys.argv[1]), RunFacts(name="mnist"))
for step in range(5):
    for logger in loggers:
        logger.log_metrics({"loss": float(step)}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def go_on(folder, steps):
    """Resume a run, log rows, and return its loggers."""
    loggers = make_loggers("wandb", folder, MNIST, resume=True)
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"loss": float(step)}, step=step)
    return loggers


def steps_told(runs):
    return [row["_step"] for run in runs for row in run.history if "loss" in row]


@pytest.mark.slow
def test_a_run_that_was_killed_lacks_no_step_and_has_none_twice(tmp_path, offline_runs):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    # W&B had written next to nothing; metrics.jsonl has every row.
    assert len(lines_of(tmp_path)) == 5
    loggers = go_on(tmp_path, [3, 4, 5])
    log_failure(loggers, KeyboardInterrupt())
    time.sleep(1)  # Files of W&B are named by the second.
    log_outcome(go_on(tmp_path, [4, 5, 6]), Outcome(summary={}, tables={"t": [{"a": 1}]}))
    *_, stopped, ended = offline_runs(tmp_path)
    assert sorted(steps_told(offline_runs(tmp_path))) == list(range(7))
    assert steps_told([ended]) == [6]
    assert [row["_step"] for row in ended.history] == [6, 7]
    assert ended.run["run_id"] == stopped.run["run_id"] == kept_run_id(tmp_path, MNIST, resume=True)
    assert ended.run["resume"]
    assert (stopped.exit_code, stopped.alerts, ended.exit_code) == (1, [], 0)


@pytest.mark.slow
def test_a_failure_is_an_alert_and_leaves_the_next_run_alone(tmp_path, offline_runs):
    loggers = make_loggers("wandb", tmp_path / "a", MNIST)
    log_failure(loggers, ValueError("The loss must be finite, but is nan at step 9."))
    log_outcome(make_loggers("wandb", tmp_path / "b", MNIST), Outcome(summary={"x": 1}))
    failed, fine = offline_runs(tmp_path)
    (alert,) = failed.alerts
    assert alert["title"] == "Training of mnist failed"
    assert alert["level"] == "ERROR"
    assert "but is nan" in alert["text"]
    assert (failed.exit_code, fine.exit_code) == (1, 0)
    assert fine.run["run_id"] != failed.run["run_id"]


def test_a_logger_of_the_user_is_told_and_stays_open(tmp_path):
    class Run:
        def __getattr__(self, name):
            if name == "finish":
                pytest.fail("ended")
            return {"config": self, "summary": self}.get(name, lambda *_, **__: None)

    own = WandbLogger(save_dir=tmp_path, offline=True, experiment=Run())
    assert not isinstance(own, RunLogger)
    log_outcome([own], Outcome(summary={"x": 1}))
    log_failure([own], ValueError("nan"))


def test_tensorboard_shows_what_counts(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged(steps, start):
        loggers = make_loggers("tensorboard", tmp_path, MNIST, step=start)
        for step in steps:
            for logger in loggers:
                logger.log_metrics({"loss": float(step)}, step=step)
                logger.save()
        return loggers

    logged([0, 1, 2, 3], 0)[1].experiment.flush()
    time.sleep(1)  # Event files are named by the second.
    loggers = logged([2, 3, 4], 2)
    for logger in loggers:
        logger.finalize("success")
    rows = [{"task": "a|b", "accuracy": 0.5}]
    summary = {"val_loss": 0.25, "base": "vit"}
    log_outcome(loggers, Outcome(summary=summary, config={"lr": 0.1}, tables={"t": rows}))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4]
    (found,) = events.Scalars("summary/val_loss")
    assert found.value == 0.25
    assert {"t/text_summary", "config/text_summary"} <= set(events.Tags()["tensors"])
