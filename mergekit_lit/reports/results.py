"""This file writes scores as tidy rows, for CSV files and W&B: one a model and task."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports.tables import Score, scores

MEAN = "(mean)"
"""What stands for the task in a row of means over the tasks."""


def result_rows(record: Record) -> list[dict[str, Any]]:
    """Return the scores of an evaluation as rows with the same keys; None where not measured.

    Experts are one model, `experts`, each on its own task; each model's means come after its tasks.
    """
    return [_row(score) for score in scores(record)]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means as `accuracy/<model>` and so on, for a table of runs."""
    measures = ("accuracy", "normalised_accuracy", "loss", "calibration_error")
    return {
        f"{measure}/{row['model']}": row[measure]
        for row in rows
        if row["task"] == MEAN
        for measure in measures
        if row[measure] is not None
    }


def by_task(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, value: str = "accuracy"
) -> list[dict[str, Any]]:
    """Return a row a model, or whatever `keys` tell apart, with a column a task.

    Args:
        rows: a row a model and task, with `task` in it.
        keys: columns that stay.
        value: the column that is spread over the tasks; None where there is no such row.
    """
    tasks = dict.fromkeys(row["task"] for row in rows)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = {key: row.get(key) for key in keys}
        found.setdefault(repr(kept), {**kept, **dict.fromkeys(tasks)})[row["task"]] = row[value]
    return list(found.values())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a heading; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(score: Score) -> dict[str, Any]:
    low, high = score.interval or (None, None)
    normalised_low, normalised_high = score.normalised_interval or (None, None)
    return {
        "model": score.model,
        "role": score.role,
        "task": MEAN if score.task is None else score.task,
        "split": score.split,
        "n": score.n,
        "accuracy": score.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "normalised_accuracy": score.normalised,
        "normalised_accuracy_low": normalised_low,
        "normalised_accuracy_high": normalised_high,
        "loss": score.loss,
        "calibration_error": score.calibration_error,
        "method": score.method,
        "data": score.data,
        "scale": score.scale,
        "val": score.val,
    }
