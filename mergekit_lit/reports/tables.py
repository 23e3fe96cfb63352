"""This file turns records into tidy rows: one a model and task, one a model, one an expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mergekit_lit.core.records import Record

Role = Literal["base", "expert", "merged", "adapted"]
"""What a model is. `adapted` merges have seen unlabelled test images: a class of their own."""

DATA_WORDS: Mapping[str, str] = {
    "none": "none",
    "cards": "experts' cards",
    "train": "training data",
    "val": "validation data",
    "test-unlabelled": "unlabelled TEST images",
}
"""What a merge method uses beside the experts' tensors, in words."""

UNKNOWN = "\u2013"
"""What stands where a number is not known."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one model does on one task, or on average.

    Attributes:
        model: its name.
        role: base, expert or merge.
        task: the task; None for the mean over tasks.
        split: which images: train, val or test.
        accuracy: share right, in [0, 1].
        interval: 95 % interval of the accuracy, where it was measured.
        normalised: accuracy over the accuracy of the task's own expert.
        normalised_interval: its 95 % interval.
        loss: cross-entropy, in nats.
        calibration_error: expected gap between confidence and accuracy, in [0, 1].
        n: number of images.
        method: the merge method, for merges.
        data: what the method used beside the experts, for merges.
        scale: the coefficient that was chosen on val, for merges that have one.
        val: normalised accuracy on val, by which merges may be chosen; None if not measured.
    """

    model: str
    role: Role
    task: str | None
    split: str
    accuracy: float
    interval: tuple[float, float] | None = None
    normalised: float | None = None
    normalised_interval: tuple[float, float] | None = None
    loss: float | None = None
    calibration_error: float | None = None
    n: int | None = None
    method: str | None = None
    data: str | None = None
    scale: float | None = None
    val: float | None = None


def scores(record: Record) -> list[Score]:
    """Return the rows of one evaluation, in the order of the record, means last of each model.

    Experts are told as one model, `experts`: each on its own task.
    """
    split = str(record.config.get("split", "test"))
    rows = [
        row
        for name, entry in _models(record).items()
        for row in _model_scores(name, entry, split=split)
    ]
    return _pool_experts(rows)


def means(rows: Sequence[Score]) -> list[Score]:
    """Return the mean rows: base first, merges from the worst to the best, experts last."""
    order = {"base": 0, "merged": 1, "adapted": 2, "expert": 3}
    found = [row for row in rows if row.task is None]
    return sorted(found, key=lambda row: (order[row.role], row.accuracy))


def tasks(rows: Sequence[Score]) -> list[str]:
    """Return the names of the tasks, in the order of the rows."""
    return list(dict.fromkeys(row.task for row in rows if row.task is not None))


def by_task(rows: Sequence[Score], task: str | None) -> dict[str, Score]:
    """Return one task's rows (or the means), by model."""
    return {row.model: row for row in rows if row.task == task}


def headline(averages: Sequence[Score]) -> Score | None:
    """Return the merge to quote: the best on val; the best of the table where val was not measured.

    Merges that have seen test images do not count. Of equal ones the first by name is taken.
    """
    merges = sorted((row for row in averages if row.role == "merged"), key=lambda row: row.model)
    measured = [row for row in merges if row.val is not None]
    if measured:
        return max(measured, key=lambda row: row.val or 0.0)
    return max(merges, key=lambda row: row.accuracy, default=None)


def verdict(rows: Sequence[Score]) -> tuple[bool, str] | None:
    """Return whether base < quoted merge < experts holds on average, and say it in one sentence.

    None where one of the three is missing.
    """
    averages = means(rows)
    base = next((row for row in averages if row.role == "base"), None)
    experts = next((row for row in averages if row.role == "expert"), None)
    merge = headline(averages)
    if base is None or experts is None or merge is None:
        return None
    name = "merge chosen on val" if merge.val is not None else "best merge"
    told = (
        f"base {base.accuracy:.3f}, {name} {merge.accuracy:.3f} ({merge.model}), "
        f"experts {experts.accuracy:.3f}"
    )
    if base.accuracy < merge.accuracy < experts.accuracy:
        return True, f"The merge lies between the base and its experts: {told}."
    return False, f"The merge does NOT lie between the base and its experts here: {told}."


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with fixed digits, or a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def interval(bounds: tuple[float, float] | None, digits: int = 3) -> str:
    """Return `[low, high]`, or nothing where the interval is unknown."""
    return "" if bounds is None else f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _models(record: Record) -> Mapping[str, Any]:
    models = record.metrics.get("models", {})
    return models if isinstance(models, Mapping) else {}


def _model_scores(name: str, entry: Mapping[str, Any], *, split: str) -> list[Score]:
    facts: dict[str, Any] = {
        "model": name,
        "role": _role(name, entry),
        "split": split,
        "method": entry.get("method"),
        "data": entry.get("data"),
        "scale": entry.get("scale"),
        "val": entry.get("val"),
    }
    rows = [Score(task=task, **facts, **_measures(m)) for task, m in entry["tasks"].items()]
    return [*rows, Score(task=None, **facts, **_measures(entry["mean"]))]


def _measures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": metrics["accuracy"],
        "interval": _pair(metrics.get("accuracy_interval")),
        "normalised": metrics.get("normalised_accuracy"),
        "normalised_interval": _pair(metrics.get("normalised_accuracy_interval")),
        "loss": metrics.get("loss"),
        "calibration_error": metrics.get("calibration_error"),
        "n": metrics.get("n"),
    }


def _role(name: str, entry: Mapping[str, Any]) -> Role:
    if entry.get("data") == "test-unlabelled":
        return "adapted"
    kind = entry.get("kind", name)
    if kind in ("base", "expert"):
        return "base" if kind == "base" else "expert"
    return "expert" if kind == "experts" else "merged"


def _pool_experts(rows: list[Score]) -> list[Score]:
    """Return the rows with all experts as one model; their mean is over their own tasks."""
    experts = [row for row in rows if row.role == "expert"]
    if len({row.model for row in experts}) <= 1:
        return [replace(row, model="experts") if row.role == "expert" else row for row in rows]
    own = [replace(row, model="experts") for row in experts if row.task is not None]
    mean = replace(
        own[0],
        task=None,
        accuracy=sum(row.accuracy for row in own) / len(own),
        interval=None,
        normalised=1.0,
        normalised_interval=None,
        loss=_mean([row.loss for row in own]),
        calibration_error=_mean([row.calibration_error for row in own]),
        n=sum(row.n or 0 for row in own) or None,
    )
    return [*(row for row in rows if row.role != "expert"), *own, mean]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def _pair(value: Sequence[float] | None) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))
