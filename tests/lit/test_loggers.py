import csv
import json
import os
import sys
import time

import pytest
from lightning.pytorch.loggers import WandbLogger

from mergekit_lit.lit.loggers import FileLogger, log_outcome, make_loggers
from mergekit_lit.lit.wandb_runs import Outcome, RunFacts, check_logger, log_run, wandb_key

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
    facts = RunFacts(name="mnist", group="demo", tags=["a" * 99, ""])
    _, logger = make_loggers("wandb", tmp_path, facts)
    assert facts.arguments()["tags"] == ["a" * 64]
    assert isinstance(logger, WandbLogger)
    assert logger._offline
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("kind", "folder", "message"),
    [
        ("wandb", None, "`logger` 'wandb' must be told a folder for its files"),
        ("wandb-online", "here", "must find an API key"),
        ("tensorboard", "here", "No logger named 'tensorboard'"),
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


def stored_run(folder, until):
    """Return the bytes of the one offline run, once W&B's own process has written `until`."""
    (run,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while until not in (stored := run.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return stored


@pytest.mark.slow
def test_an_offline_run_keeps_summary_table_and_expert(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    expert = tmp_path / "mnist.safetensors"
    expert.write_bytes(b"bytes")
    facts = RunFacts(name="mnist", config={"lr": 0.1})
    loggers = make_loggers("wandb", tmp_path / "logs", facts)
    for logger in loggers:
        logger.log_metrics({"loss": 1.0}, step=0)
    rows = [{"task": "mnist", "accuracy": 0.5}]
    outcome = Outcome(summary={"val_loss": 1.0}, rows=rows, files={expert: {"lr": 0.1}})
    log_outcome(loggers, outcome)
    stored = stored_run(tmp_path / "logs", b"results")
    for text in (b"mnist", b"val_loss", b"results", b"loss", b"lr"):
        assert text in stored
    assert lines_of(tmp_path / "logs") == [{"step": 0, "loss": 1.0}]


@pytest.mark.slow
def test_an_ended_run_is_told_at_once_and_leaves_the_caller_s_open(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    file = tmp_path / "two tasks, merged.safetensors"
    file.write_bytes(b"bytes")
    facts = RunFacts(name="ties", job="merge", group="runs", tags=["a-tag"], config={"scale": 0.5})
    rows = [{"task": "mnist", "coefficient": None}, {"task": "letters", "coefficient": 0.5}]
    outcome = Outcome(summary={"method": "ties"}, rows=rows, files={file: {}}, kind="merged")
    import wandb

    own = wandb.init(dir=tmp_path, name="own")
    log_run("wandb", tmp_path / "logs", facts, outcome)
    assert wandb.run is own
    own.finish()
    stored = stored_run(tmp_path / "logs", b"two-tasks--merged")
    for text in (b"ties", b"merge", b"runs", b"a-tag", b"scale", b"results"):
        assert text in stored
