"""This file is where numbers go while training: JSON lines and CSV always, W&B when asked for."""

import csv
import io
import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mergekit_lit.core.files import append_text, write_text
from mergekit_lit.core.records import plain
from mergekit_lit.lit.wandb_runs import (
    LoggerKind,
    Outcome,
    RunFacts,
    check_logger,
    finish_run,
    is_online,
)


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
        try:
            text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        # A killed run may leave half a line, without its newline, at the end.
        whole = text[: text.rfind("\n") + 1].splitlines()
        rows = [json.loads(line) for line in whole]
        return [row for row in rows if step is not None and (row["step"] or 0) < step]


def make_loggers(kind: LoggerKind, folder: Path, facts: RunFacts) -> list[Logger]:
    """Return the loggers of one run of training; nothing is written before the first row.

    W&B stays offline, without a prompt and without a network, unless the user asks for it online.

    Args:
        kind: `csv`, `wandb` or `wandb-online`.
        folder: where metrics.jsonl and metrics.csv go, and W&B's files.
        facts: what W&B is told of the run.

    Raises:
        ValueError: an unknown kind, or W&B online without a key.
        ModuleNotFoundError: W&B is asked for and not installed.
    """
    files = FileLogger(folder)
    check_logger(kind)
    if kind == "csv":
        return [files]
    Path(folder).mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(save_dir=folder, offline=not is_online(kind), **facts.arguments())
    # Lightning passes an argument that wandb 0.31 only warns about; nobody can act on that.
    logger._wandb_init.pop("anonymous", None)
    return [files, logger]


@rank_zero_only
def log_outcome(loggers: Iterable[Logger], outcome: Outcome) -> None:
    """Hand a run's outcome to W&B, where it is in use, and end the W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            finish_run(logger.experiment, outcome)


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
