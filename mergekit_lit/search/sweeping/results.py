"""This file tells the results of a sweep: a row for each expert or model, and what failed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.results import csv_text
from mergekit_lit.search.sweeping.failures import failure_of
from mergekit_lit.search.sweeping.plan import Run
from mergekit_lit.search.sweeping.worker import Sweep

TABLE = "results.csv"


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        done: runs that are done, by now or before.
        failed: errors of the others, by name.
    """

    done: tuple[Run, ...]
    failed: Mapping[str, str]


def outcome_of(sweep: Sweep) -> Outcome:
    """Return which runs are done, and why the others are not."""
    done, failed = [], {}
    for run in sweep.plan.runs:
        if sweep.is_done(run):
            done.append(run)
            continue
        failure = failure_of(sweep.folder(run))
        failed[run.name] = failure.error if failure else "It was not reached."
    return Outcome(tuple(done), failed)


def write_table(sweep: Sweep, outcome: Outcome) -> Path:
    """Write `results.csv`: the axes' values of each expert or model, and what was measured."""
    path = sweep.out / TABLE
    write_text(path, csv_text(table_rows(sweep, outcome)))
    return path


def table_rows(sweep: Sweep, outcome: Outcome) -> list[dict[str, Any]]:
    """Return a row for each expert or model, all with the same keys."""
    rows = list(_rows(sweep, outcome))
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _rows(sweep: Sweep, outcome: Outcome) -> Iterator[dict[str, Any]]:
    for run in outcome.done:
        config = sweep.plan.config(run)
        point = {key: config.get(key) for key in sweep.plan.keys}
        for row in sweep.job.rows(sweep.folder(run)):
            # What a result tells itself, such as its task and steps, needs no second column.
            chosen = {key: point[key] for key in point if key.rpartition(".")[2] not in row}
            file = sweep.folder(run).relative_to(sweep.out) / row["file"]
            yield {"run": run.name, **chosen, **row, "file": str(file)}
