"""This file is Weights & Biases: runs that stay offline, never prompt and never wait.

Nothing here needs Lightning, so that `merge` does not either. One process tells each run.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import urlsplit

from mergekit_lit.core.records import plain
from mergekit_lit.core.registry import unknown_name

if TYPE_CHECKING:
    from wandb import Run

LoggerKind = Literal["csv", "wandb", "wandb-online"]
"""`csv`: files alone. `wandb`: W&B too, offline. `wandb-online`: W&B too, over the network."""

# What W&B accepts: longer tags, and other characters in the name of an artifact, are errors.
_TAG_LENGTH, _NAME_LENGTH = 64, 128
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_.-]")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What W&B is told of a run before it starts.

    Attributes:
        name: name of the run, such as the task.
        job: kind of the run: `train`, `merge`, `tune`, `evaluate` or `quickstart`.
        group: runs that belong together, such as the folder of the experts of one suite.
        tags: words to filter by.
        config: every setting, for W&B's table of runs.
    """

    name: str
    job: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `wandb.init`."""
        return {
            "name": self.name,
            "project": os.environ.get("WANDB_PROJECT", "mergekit-lit"),
            "job_type": self.job,
            "group": self.group or None,
            "tags": [tag[:_TAG_LENGTH] for tag in self.tags if tag],
            "config": dict(plain(self.config)),
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What W&B is told of a run at its end.

    Attributes:
        summary: the final numbers.
        rows: a table of results, all rows with the same keys.
        files: files to keep as artifacts, each with its facts.
        kind: what the files are: `expert` or `merged`.
    """

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    files: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    kind: str = "expert"


def check_logger(kind: str, folder: Path | None = Path()) -> None:
    """Refuse, before any work, a logger that could not be used; settle W&B's mode.

    Args:
        kind: `csv`, `wandb` or `wandb-online`.
        folder: where W&B's files would go; None if there is no such place.

    Raises:
        ValueError: an unknown kind, W&B online without a key, or W&B without a folder.
        ModuleNotFoundError: W&B is asked for and not installed.
    """
    if kind not in get_args(LoggerKind):
        raise ValueError(unknown_name("logger", kind, get_args(LoggerKind)))
    if kind == "csv":
        return
    if folder is None:
        raise ValueError(
            f"`logger` {kind!r} must be told a folder for its files, but `out` is not given. "
            "Give `out`."
        )
    _prepare(online=is_online(kind))


def is_online(kind: str) -> bool:
    """Return whether W&B talks to its server."""
    return kind == "wandb-online" or os.environ.get("WANDB_MODE") == "online"


def log_run(kind: LoggerKind, folder: Path, facts: RunFacts, outcome: Outcome) -> None:
    """Tell W&B a run that has ended, in one go; nothing for `csv`.

    Args:
        kind: `csv`, `wandb` (offline) or `wandb-online`.
        folder: where W&B's files go.
        facts: what the run was.
        outcome: what came of it.

    Raises:
        ValueError: as `check_logger`.
        ModuleNotFoundError: W&B is not installed.
    """
    check_logger(kind)
    if kind == "csv":
        return
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    # A run that the caller has open is left alone.
    finish_run(wandb.init(dir=folder, reinit="create_new", **facts.arguments()), outcome)


def finish_run(run: "Run", outcome: Outcome) -> None:
    """Write summary, table and artifacts to a W&B run, and end it."""
    import wandb

    run.summary.update(plain(outcome.summary))
    if outcome.rows:
        columns: list[str | int] = list(outcome.rows[0])
        cells = [[plain(row[str(column)]) for column in columns] for row in outcome.rows]
        run.log({"results": wandb.Table(columns=columns, data=cells)})
    for file, facts in outcome.files.items():
        name = _NOT_IN_NAMES.sub("-", file.stem)[:_NAME_LENGTH]
        artifact = wandb.Artifact(name, type=outcome.kind, metadata=dict(plain(facts)))
        artifact.add_file(str(file))
        run.log_artifact(artifact)
    run.finish()


def wandb_key() -> bool:
    """Return whether W&B would find an API key: WANDB_API_KEY, or the netrc of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _prepare(*, online: bool) -> None:
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
