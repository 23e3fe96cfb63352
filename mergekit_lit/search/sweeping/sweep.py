"""This file is a sweep from its plan to its table: launched, watched, and told at the end."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.search.display import Display
from mergekit_lit.search.sweeping.jobs import Job
from mergekit_lit.search.sweeping.launchers.local import run_local
from mergekit_lit.search.sweeping.plan import Plan
from mergekit_lit.search.sweeping.results import Outcome, outcome_of, write_table
from mergekit_lit.search.sweeping.worker import Listen, Sweep
from mergekit_lit.stages.folders import check_folder, check_record

LauncherName = Literal["local"]
RECORD = "sweep.record.json"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep made.

    Attributes:
        record: settings, numbers of runs and experts, errors, seconds.
        table: `results.csv`, a row for each expert or model.
        outcome: the runs that are done, and the errors of the others.
    """

    record: Record
    table: Path
    outcome: Outcome


def run_sweep(
    plan: Plan,
    job: Job,
    *,
    out: Path,
    launcher: LauncherName = "local",
    jobs: int = 1,
    retries: int = 2,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Do every run of a plan that is not done yet.

    Writes `runs/<name>/` for each run, and at the end `results.csv` and `sweep.record.json`. It can
    be killed at any time, and started again, also while another launch of it runs.

    Args:
        plan: the runs.
        job: how to do one.
        out: the sweep's folder.
        launcher: where workers run.
        jobs: number of workers, at least 1.
        retries: how often a run that failed is tried again, at least 0.
        config: what the record is to tell of the sweep's file.
        quiet: whether to draw no progress.

    Raises:
        KeyError: an unknown launcher.
        ValueError: an argument out of range, or a folder that cannot be written.
    """
    watch = Stopwatch()
    if launcher not in get_args(LauncherName):
        raise KeyError(unknown_name("launcher", launcher, get_args(LauncherName)))
    for name, value, least in (("jobs", jobs, 1), ("retries", retries, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    check_folder(out)
    check_record(out / RECORD, "sweep")
    sweep = Sweep(plan=plan, job=job, out=out, launch=secrets.token_hex(8), retries=retries)
    workers = min(jobs, max(1, len(plan.runs)))
    with Display(Console(quiet=quiet, stderr=True)) as display:
        run_local(sweep, _drawer(display, len(plan.runs)), jobs=workers)
    outcome = outcome_of(sweep)
    table = write_table(sweep, outcome)
    record = watch.finish(
        Record(
            stage="sweep",
            name=out.resolve().name,
            config=dict(config or {}),
            metrics=_metrics(plan, outcome),
            outputs=[table.name],
        )
    )
    record.write(out / RECORD)
    return SweepResult(record, table, outcome)


def _metrics(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    return {
        "runs": len(plan.runs),
        "results": plan.results,
        "done": len(outcome.done),
        "failed": dict(outcome.failed),
    }


def _drawer(display: Display, total: int) -> Listen:
    """Return what draws a bar of the runs, and which began last."""
    ended: set[str] = set()
    failed: set[str] = set()

    def listen(state: str, name: str, error: str) -> None:
        if state != "begun":
            ended.add(name)
        if state == "failed":
            failed.add(name)
        note = f"{len(failed)} failed, last: {error or name}" if failed else name
        display.show("runs", len(ended), total, note)

    display.show("runs", 0, total)
    return listen
