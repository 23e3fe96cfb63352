"""This file tells W&B, or TensorBoard, a whole sweep: one run with the tables of all results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.lit.run_facts import LoggerKind, Outcome
from mergekit_lit.lit.tracking import log_run
from mergekit_lit.reports.results import by_task
from mergekit_lit.search.sweeping.results import Outcome as SweepOutcome
from mergekit_lit.search.sweeping.results import table_rows
from mergekit_lit.search.sweeping.worker import Sweep
from mergekit_lit.stages.run_groups import facts_of_run

# What tells results of a point apart, beside its values.
_APART = ("model", "steps")


def log_sweep(sweep: Sweep, outcome: SweepOutcome, record: Record, logger: LoggerKind) -> None:
    """Tell how a sweep ended: every result, the tasks side by side, and what failed.

    Args:
        sweep: what was done.
        outcome: how it ended.
        record: the same in numbers.
        logger: where it is told.
    """
    rows = table_rows(sweep, outcome)
    counts = {name: record.metrics[name] for name in ("runs", "results", "done")}
    failed = [{"run": run, "error": error} for run, error in outcome.failed.items()]
    facts = facts_of_run(
        record.stage,
        record.name,
        sweep.out,
        tags=[sweep.job.stage, *_words(record), record.name],
        config=record.config,
    )
    told = Outcome(
        summary={**counts, "failed": len(failed), "best": record.metrics.get("best")},
        tables={"results": rows, "by_task": _by_task(sweep, rows), "failed": failed},
    )
    log_run(logger, sweep.out / "logs" / "sweep", facts, told, once=True)


def _by_task(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the accuracy of each point with a column a task, where results are of tasks."""
    value = next((name for name in ("accuracy", "val_accuracy") if rows and name in rows[0]), None)
    if value is None or "task" not in rows[0]:
        return []
    axes = [key for key in sweep.plan.keys if key in rows[0]]
    return by_task(rows, [*axes, *(name for name in _APART if name in rows[0])], value=value)


def _words(record: Record) -> list[str]:
    """Return suite and backbone, where the sweep has one of each."""
    data, model = (record.config.get(group) or {} for group in ("data", "model"))
    named = [Path(str(data.get("suite", ""))).name, str(model.get("base", ""))]
    return [word for word in named if word]
