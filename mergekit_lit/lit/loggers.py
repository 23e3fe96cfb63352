"""This file is where numbers go while training: JSON lines and CSV always, W&B when asked for."""

import csv
import io
import json
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import plain
from mergekit_lit.core.registry import unknown_name

LoggerKind = Literal["csv", "wandb", "wandb-online"]
"""`csv`: files alone. `wandb`: W&B too, offline. `wandb-online`: W&B too, over the network."""


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
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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


def make_loggers(
    kind: LoggerKind,
    folder: Path,
    *,
    name: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Return the loggers of one run; nothing is written before the first row.

    W&B stays offline, without a prompt and without a network, unless the user asks for it online.

    Args:
        kind: `csv`, `wandb` or `wandb-online`.
        folder: where metrics.jsonl and metrics.csv go, and W&B's offline files.
        name: name of the run in W&B, such as the task.
        group: W&B group, such as the name of the folder of the experts of one suite.
        tags: W&B tags.
        config: every hyperparameter, for W&B's table of runs.

    Raises:
        ValueError: an unknown kind, or W&B online without a key.
        ModuleNotFoundError: W&B is asked for and not installed.
    """
    files = FileLogger(folder)
    if kind == "csv":
        return [files]
    if kind not in ("wandb", "wandb-online"):
        raise ValueError(unknown_name("logger", kind, ("csv", "wandb", "wandb-online")))
    online = kind == "wandb-online" or os.environ.get("WANDB_MODE") == "online"
    _prepare_wandb(online=online)
    Path(folder).mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        name=name,
        project=os.environ.get("WANDB_PROJECT", "mergekit-lit"),
        save_dir=folder,
        offline=not online,
        group=group,
        # W&B refuses tags of more than 64 characters.
        tags=[tag[:64] for tag in tags],
        config=dict(plain(config or {})),
    )
    # Lightning passes an argument that wandb 0.31 only warns about; nobody can act on that.
    logger._wandb_init.pop("anonymous", None)
    return [files, logger]


def log_results(
    loggers: Iterable[Logger],
    *,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    files: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Hand a run's outcome to W&B, where it is in use, and end the W&B run.

    Args:
        loggers: the loggers of the run.
        summary: the run's final numbers.
        rows: a table of results, all rows with the same keys.
        files: safetensors files to keep as artifacts, each with its card.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _finish_wandb(logger, summary, rows, files)


@rank_zero_only
def _finish_wandb(
    logger: WandbLogger,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[Path, Mapping[str, Any]],
) -> None:
    import wandb

    run = logger.experiment
    run.summary.update(plain(summary))
    if rows:
        columns: list[str | int] = list(rows[0])
        cells = [[plain(row[str(column)]) for column in columns] for row in rows]
        run.log({"results": wandb.Table(columns=columns, data=cells)})
    for file, card in files.items():
        artifact = wandb.Artifact(file.stem, type="expert", metadata=dict(plain(card)))
        artifact.add_file(str(file))
        run.log_artifact(artifact)
    run.finish()


def _prepare_wandb(*, online: bool) -> None:
    """Settle W&B's mode before it is first imported, so that it can neither prompt nor wait."""
    if find_spec("wandb") is None:
        raise ModuleNotFoundError("Logging to W&B needs it installed: pip install wandb")
    if not online:
        if os.environ.get("WANDB_MODE") != "disabled":
            os.environ["WANDB_MODE"] = "offline"
    elif not wandb_key():
        raise ValueError(
            "W&B online must find an API key, but there is none. Run `wandb login` or set "
            "WANDB_API_KEY, or log offline: --logger wandb."
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")


def wandb_key() -> bool:
    """Return whether W&B would find an API key: WANDB_API_KEY, or the netrc of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


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
