"""This file is Weights & Biases: runs that stay offline, never prompt and never wait.

Models are kept as artifacts with their lineage: base -> expert -> merge -> evaluation. A run that
uses a model tells W&B of the same content under the same name as the run that made it, so that
both mean one version of one artifact, also where neither has seen a server yet.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mergekit_lit.core.files import file_hash, read_json, write_json
from mergekit_lit.core.records import plain
from mergekit_lit.lit.run_facts import Outcome, RunFacts, TrackedModel

if TYPE_CHECKING:
    from wandb import Artifact, Run, Table

# What W&B accepts: longer tags, and other characters in the name of an artifact, are errors.
_TAG_LENGTH, _NAME_LENGTH = 64, 128
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_.-]")
_ID_FILE = "wandb_run.json"
_READ_S, _PATIENCE_S, _POLL_S = 120.0, 30.0, 0.2


def prepare(*, online: bool) -> None:
    """Settle W&B's mode before it is first imported, so that it can neither prompt nor wait.

    Raises:
        ModuleNotFoundError: W&B is not installed.
        ValueError: it is to be online, and there is no key.
    """
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
    # A process hands its children the service that writes its runs. A child that is killed would
    # leave its run open there, and nobody could go on with it: each process has a service of its
    # own, as W&B's agents see to as well.
    if f"-{os.getpid()}-" not in os.environ.get("WANDB_SERVICE", ""):
        os.environ.pop("WANDB_SERVICE", None)


def is_online(kind: str) -> bool:
    """Return whether W&B talks to its server: if it is told to, or its agent started this."""
    agent = "WANDB_SWEEP_ID" in os.environ
    return kind == "wandb-online" or agent or os.environ.get("WANDB_MODE") == "online"


def wandb_key() -> bool:
    """Return whether W&B would find an API key: WANDB_API_KEY, or the netrc of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def project() -> str:
    """Return the project that runs go to."""
    return os.environ.get("WANDB_PROJECT", "mergekit-lit")


def start_run(facts: RunFacts, folder: Path, *, online: bool, run_id: str | None = None) -> "Run":
    """Start a run; one that the caller has open is left alone.

    Args:
        facts: what W&B is told of it.
        folder: where W&B's files go.
        online: whether it talks to the server.
        run_id: identifies a run that may go on; None for a new one. What an agent of a W&B sweep
            starts is the agent's run, however often this is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tags = dict.fromkeys(tag[:_TAG_LENGTH] for tag in (*facts.tags, facts.job) if tag)
    disabled = os.environ.get("WANDB_MODE") == "disabled"
    return _started(
        dir=folder,
        id=run_id,
        name=facts.name,
        project=project(),
        job_type=facts.job,
        group=facts.group or None,
        tags=list(tags),
        config=dict(plain(facts.config)),
        mode="disabled" if disabled else "online" if online else "offline",
        resume="allow",
        reinit="create_new",
    )


def _started(**settings: Any) -> "Run":
    import wandb

    begun = time.monotonic()
    while True:
        try:
            return wandb.init(**settings)
        # W&B does not wait until a run that was ended in this process has gone, and has no class of
        # errors for it.
        except Exception as error:
            if "is in use" not in str(error) or time.monotonic() - begun > _PATIENCE_S:
                raise
            time.sleep(_POLL_S)


def tell(run: "Run", outcome: Outcome, *, step: int | None = None) -> None:
    """Write what came of a run: settings, models that it used, numbers, tables, models it made.

    Args:
        run: the run.
        outcome: what came of it.
        step: of the tables in the run's history; None for its next one.
    """
    run.config.update(  # type: ignore[no-untyped-call] # W&B's, untyped
        dict(plain(outcome.config)), allow_val_change=True
    )
    for model in outcome.used:
        artifact = _artifact(model)
        if run.offline:
            # `use_artifact` asks the server for versions, and so refuses; this is what it writes of
            # an artifact that is at hand, and what `wandb sync` makes the same link of.
            run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
        else:
            run.use_artifact(artifact)
    run.summary.update(plain(outcome.summary))
    tables = {name: _table(rows) for name, rows in outcome.tables.items() if rows}
    if tables:
        run.log(tables, step=step)
    sources = {f"{model.kind}-{model.name}": _content(model) for model in outcome.used}
    for model in outcome.made:
        run.log_artifact(_artifact(model, sources=sources))


def kept_run_id(folder: Path, facts: RunFacts, *, resume: bool) -> str:
    """Return what identifies a run; kept in its folder, so that it goes on under it anywhere.

    Made of machine, folder, settings and the run that stood there before: whoever starts anew, also
    with the same settings, has another run.

    Args:
        folder: of the run's logs.
        facts: of the run.
        resume: whether a run with these settings goes on.
    """
    path, settings = folder / _ID_FILE, _digest(plain(facts.config))
    before: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):
        before = read_json(path)
    if resume and before.get("settings") == settings:
        return str(before["id"])
    place = [platform.node(), str(folder.resolve()), facts.name, settings, before.get("id")]
    found = _digest(place)[:16]
    write_json(path, {"id": found, "settings": settings})
    return found


def offline_history(folder: Path, run_id: str) -> set[tuple[int, str]]:
    """Return step and name of every number that offline files of a run hold.

    W&B writes every 15 s: a killed process takes along what it logged last. Only the files tell
    what is there, and W&B's own reader reads them.
    """
    found = set()
    for file in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
            capture_output=True,
            text=True,
            timeout=_READ_S,
            check=False,
            env={**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
        )
        records = (json.loads(line) for line in done.stdout.splitlines())
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        found |= {(int(item["_step"]), name) for item in items for name in item}
    return found


def _artifact(model: TrackedModel, *, sources: Mapping[str, Any] | None = None) -> "Artifact":
    """Return a model as W&B keeps it; files are named where they lie rather than copied."""
    import wandb

    name = _NOT_IN_NAMES.sub("-", f"{model.kind}-{model.name}")[:_NAME_LENGTH]
    facts = {**model.facts, "content": _content(model)}
    told = {**facts, "made_from": sources} if sources else facts
    artifact = wandb.Artifact(name, type=model.kind, metadata=dict(plain(told)))
    for file in model.files:
        artifact.add_file(str(file.resolve()), policy="immutable", skip_cache=True)
    if not model.files:
        with artifact.new_file(f"{model.kind}.json") as text:
            text.write(json.dumps(plain(model.facts), sort_keys=True))
    return artifact


def _content(model: TrackedModel) -> Any:
    """Return what tells the model's content from others, by file if there are several."""
    if not model.files or "content" in model.facts:
        return model.facts.get("content")
    hashes = {file.name: file_hash(file) for file in model.files}
    return next(iter(hashes.values())) if len(hashes) == 1 else hashes


def _table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    import wandb

    columns: list[str | int] = list(rows[0])
    cells = [[_cell(row[str(column)]) for column in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells)


def _cell(value: Any) -> Any:
    """Return a cell of a table: a column of W&B has one type, numbers apart from text."""
    told = plain(value)
    return json.dumps(told) if isinstance(told, (dict, list)) else told


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
