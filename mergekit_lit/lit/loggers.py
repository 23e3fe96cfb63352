"""This file is where numbers go while training: JSON lines and CSV always, others if asked."""

import csv
import io
import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mergekit_lit.core.files import append_text, write_text
from mergekit_lit.core.records import plain
from mergekit_lit.lit import tensorboard_runs
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, RunFacts
from mergekit_lit.lit.tracking import check_logger
from mergekit_lit.lit.wandb_runs import (
    is_online,
    kept_run_id,
    offline_history,
    project,
    start_run,
    tell,
)

if TYPE_CHECKING:
    from wandb import Run

# What W&B accepts.
_TITLE_LENGTH = 63


class FileLogger(Logger):
    """Writes each row of metrics to metrics.jsonl at once, and metrics.csv at every save.

    A resumed run writes again from the step that it resumes at: rows at or after the first logged
    step are dropped first, so that the files hold one row of each kind a step.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Return nothing: a folder holds one run."""
        return ""

    @property
    def log_dir(self) -> str:
        """Return the folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row, with `step` first."""
        row = {"step": step, **plain({name: float(value) for name, value in metrics.items()})}
        if self._rows is None:
            self._rows = self._earlier_rows(step)
            write_text(self.folder / "metrics.jsonl", _lines(self._rows))
        self._rows.append(row)
        append_text(self.folder / "metrics.jsonl", json.dumps(row) + "\n")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Write nothing: the expert's card and record hold the configuration."""

    @rank_zero_only
    def save(self) -> None:
        """Write metrics.csv, whose columns are all metrics seen so far."""
        if self._rows:
            write_text(self.folder / "metrics.csv", _table(self._rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write metrics.csv."""
        self.save()

    def _earlier_rows(self, step: int | None) -> list[dict[str, Any]]:
        rows = rows_of(self.folder)
        return [row for row in rows if step is not None and (row["step"] or 0) < step]


class RunLogger(WandbLogger):
    """Tells W&B each row under the step of the training, so that a resumed run adds to its history.

    What a killed process took along, metrics.jsonl still holds: it is told first. What W&B has
    already is not told again.
    """

    def __init__(self, facts: RunFacts, folder: Path, *, online: bool, resume: bool) -> None:
        """Start nothing yet: W&B hears of the run with its first row.

        Args:
            facts: what W&B is told of the run.
            folder: where metrics.jsonl lies, and W&B's files go.
            online: whether W&B talks to its server.
            resume: whether a run with these settings goes on.
        """
        super().__init__(save_dir=folder, offline=not online, project=project())
        self._facts, self._folder, self._resumed = facts, Path(folder), resume
        self._told: set[tuple[int, str]] = set()
        self._missed: list[dict[str, Any]] = []
        self._last_step = -1

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The run, started when it is first asked for."""
        if self._experiment is None:
            self._id = kept_run_id(self._folder, self._facts, resume=self._resumed)
            if self._resumed:
                self._told = offline_history(self._folder, self._id)
                self._missed = rows_of(self._folder)
            online = not self._offline
            self._experiment = start_run(self._facts, self._folder, online=online, run_id=self._id)
        return cast("Run", self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Tell one row, and before it those that W&B should have heard of by now."""
        run = self.experiment
        now = run.step if step is None else step
        missed, self._missed = self._missed, []
        for row in missed:
            if row["step"] is not None and row["step"] < now:
                self._tell(row["step"], {name: row[name] for name in row if name != "step"})
        self._tell(now, metrics)

    @rank_zero_only
    def end(self, outcome: Outcome) -> None:
        """Tell what came of the run, and end it."""
        run = self.experiment
        tell(run, outcome, step=max(self._last_step + 1, run.step))
        run.finish()

    @rank_zero_only
    def fail(self, error: BaseException) -> None:
        """End the run as one that failed, with an alert, or as one that was told to end."""
        run = self.experiment
        if isinstance(error, SystemExit):
            run.mark_preempting()
        if isinstance(error, Exception):
            title = f"Training of {self._facts.name} failed"
            run.alert(title[:_TITLE_LENGTH], str(error), level="ERROR")
        run.finish(exit_code=1)

    def _tell(self, step: int, values: Mapping[str, float | None]) -> None:
        run = self.experiment
        self._last_step = max(self._last_step, step)
        new = {
            name: value
            for name, value in values.items()
            # A server says at which step a run goes on.
            if value is not None and (step, name) not in self._told and step >= run.starting_step
        }
        if new:
            # Somebody else's rows without a step may have moved W&B's on, which never goes back.
            run.log({**new, "trainer/global_step": step}, step=max(step, run.step))


def make_loggers(
    kind: LoggerKind, folder: Path, facts: RunFacts, *, resume: bool = False, step: int = 0
) -> list[Logger]:
    """Return the loggers of one run of training; nothing is written before the first row.

    W&B stays offline, without a prompt and without a network, unless the user asks for it online.

    Args:
        kind: `csv`, `tensorboard`, `wandb` or `wandb-online`.
        folder: where metrics.jsonl and metrics.csv go, and the tracker's files.
        facts: what the tracker is told of the run.
        resume: whether the run goes on, if it has the same settings.
        step: how many steps it has behind it.

    Raises:
        ValueError: an unknown kind, or W&B online without a key.
        ModuleNotFoundError: what is asked for is not installed.
    """
    files = FileLogger(folder)
    check_logger(kind)
    if kind == "csv":
        return [files]
    if kind == "tensorboard":
        # Rows of a killed process, from there on, are not shown.
        board = TensorBoardLogger(
            folder, name="", version="", default_hp_metric=False, purge_step=step
        )
        return [files, board]
    return [files, RunLogger(facts, folder, online=is_online(kind), resume=resume)]


@rank_zero_only
def log_outcome(loggers: Iterable[Logger], outcome: Outcome) -> None:
    """Hand a run's outcome to W&B and TensorBoard, where they are in use, and end our W&B run."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.end(outcome)
        elif isinstance(logger, WandbLogger):
            # The user's own: it may be of more than this training.
            tell(logger.experiment, outcome)
        elif isinstance(logger, TensorBoardLogger):
            tensorboard_runs.tell(logger.experiment, {}, outcome)
            logger.experiment.flush()


@rank_zero_only
def log_failure(loggers: Iterable[Logger], error: BaseException) -> None:
    """Let W&B know that a run failed, or was stopped, where it knows of the run."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.fail(error)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the whole rows of metrics.jsonl; none if there is no such file."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    rows = []
    # A killed run may leave half a line, without its newline, at the end.
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            # A disk that lost its power: what follows is no more to be trusted.
            break
    return rows


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV text: `step`, then every metric in the order of its first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
