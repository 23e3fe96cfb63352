"""This file checks the tracker that a user asks for, and tells it runs that have ended.

Nothing here needs Lightning, so that `merge` does not either. One process tells each run.
"""

from dataclasses import replace
from pathlib import Path
from typing import get_args

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit import tensorboard_runs, wandb_runs
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, RunFacts


def check_logger(kind: str, folder: Path | None = Path()) -> None:
    """Refuse, before any work, a logger that could not be used; settle W&B's mode.

    Args:
        kind: `csv`, `tensorboard`, `wandb` or `wandb-online`.
        folder: where its files would go; None if there is no such place.

    Raises:
        ValueError: an unknown kind, W&B online without a key, or no folder.
        ModuleNotFoundError: what is asked for is not installed.
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
    if kind == "tensorboard":
        tensorboard_runs.check()
    else:
        wandb_runs.prepare(online=wandb_runs.is_online(kind))


def log_run(
    kind: LoggerKind, folder: Path, facts: RunFacts, outcome: Outcome, *, once: bool = False
) -> None:
    """Tell a run that has ended, in one go; nothing for `csv`.

    Args:
        kind: `csv`, `tensorboard`, `wandb` (offline) or `wandb-online`.
        folder: where the tracker's files go.
        facts: what the run was.
        outcome: what came of it.
        once: whether what was told from this folder before was the same run, which W&B then keeps
            as one.

    Raises:
        ValueError: as `check_logger`.
        ModuleNotFoundError: what is asked for is not installed.
    """
    check_logger(kind)
    if kind == "tensorboard":
        with tensorboard_runs.writer(folder) as writer:
            tensorboard_runs.tell(writer, facts.config, outcome)
    elif kind != "csv":
        online = wandb_runs.is_online(kind)
        # Settings may have grown, as those of a sweep by another axis.
        same = replace(facts, config={})
        known = wandb_runs.kept_run_id(folder, same, resume=True) if once else None
        run = wandb_runs.start_run(facts, folder, online=online, run_id=known)
        wandb_runs.tell(run, outcome)
        run.finish()
