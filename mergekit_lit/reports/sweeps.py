"""This file sums a sweep up: each setting's effect, the best configurations, methods by task."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.reports.filters import Row
from mergekit_lit.reports.index import TRAINED, Entry
from mergekit_lit.reports.intervals import student_half_width
from mergekit_lit.reports.results import MEAN

_SCORES = ("accuracy", "normalised_accuracy", "loss", "calibration_error", "val")
_BOUNDS = ("accuracy_low", "accuracy_high", "normalised_accuracy_low", "normalised_accuracy_high")
_MEASURES = frozenset((*TRAINED, *_SCORES, *_BOUNDS, "n"))
# What is asked for when nobody says: the first that most results have.
_USUAL = ("val_accuracy", "accuracy", "val_loss", "loss")
# More levels than this of a number are shown as ranges.
_MOST_LEVELS, _RANGES = 12, 8
_SEEN = " (test)"


@dataclass(frozen=True)
class Level:
    """What the results with one value, or range of values, of a factor have in common.

    Attributes:
        label: the value or the range.
        mean: of the objective over all else.
        low: its 10th percentile.
        high: its 90th percentile.
        count: number of results.
    """

    label: str
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Configuration:
    """One choice of all that varies but tasks and seeds.

    Attributes:
        values: value of each factor, by name.
        mean: of the objective over tasks and seeds.
        interval: 95 % interval of the mean over seeds (Student's); None for fewer than two.
        count: number of results.
        record: file of one of the records.
    """

    values: Mapping[str, Any]
    mean: float
    interval: tuple[float, float] | None
    count: int
    record: str


def sweep_rows(entries: Iterable[Entry]) -> list[Row]:
    """Return a row for each result, with the settings that led to it and the record's file.

    Scores of a merge lie beside the record of the merge, whose settings are theirs. What a result
    tells itself, such as its task and steps, takes the place of the setting.
    """
    held = list(entries)
    merges = defaultdict(list)
    for entry in held:
        if entry.stage == "merge":
            merges[_folder(entry)].append(entry.settings)
    rows: list[Row] = []
    for entry in held:
        settings = entry.settings
        beside = merges[_folder(entry)] if entry.stage == "evaluate" else []
        if len(beside) == 1:
            rest = {key: value for key, value in settings.items() if key != "models"}
            settings = {**rest, **beside[0]}
        for result in entry.results:
            told = result.keys() - _MEASURES
            kept = {k: v for k, v in settings.items() if k.rpartition(".")[2] not in told}
            rows.append({**kept, **result, "record": entry.path})
    return rows


def objective_of(rows: Iterable[Row], given: str | None) -> str:
    """Return what results are compared by: what is given, or the usual measure of most results.

    Raises:
        KeyError: no result has what is given.
        ValueError: there is no result.
    """
    counts = Counter(name for row in rows for name in row if name in _MEASURES)
    known = [name for name in counts if name not in _BOUNDS and name != "n"]
    if not known:
        raise ValueError(
            "A report of a sweep needs results, but no record has any; a sweep of merges scores "
            "them with --score val."
        )
    if given is None:
        return max(_USUAL, key=counts.__getitem__) if counts.keys() & set(_USUAL) else known[0]
    if given not in known:
        raise KeyError(unknown_name("measure", given, known))
    return given


def smaller_is_better(objective: str) -> bool:
    """Return whether an objective is a loss or an error."""
    return "loss" in objective or "error" in objective


def is_adapted(row: Row) -> bool:
    """Return whether a result is of a method that has seen unlabelled test images."""
    return row.get("role") == "adapted"


def scored(rows: Iterable[Row], objective: str) -> list[Row]:
    """Return the rows that count once: with the objective, and means instead of their tasks."""
    held = [row for row in rows if row.get(objective) is not None]
    means = [row for row in held if row.get("task") == MEAN]
    return means or held


def factors(rows: Sequence[Row]) -> list[str]:
    """Return the names of the settings that have two values or more."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, value in row.items():
            if value is not None and len(values[name]) < 2:
                values[name].add(str(value))
    apart = {*_MEASURES, "record"}
    return [
        name
        for name, found in values.items()
        if len(found) > 1 and name not in apart and not name.endswith("_hash")
    ]


def marginal(rows: Iterable[Row], factor: str, objective: str) -> list[Level]:
    """Return the objective at each level of a factor, over all other settings.

    Numbers go upwards, in ranges of equally many results where there are many; other levels go
    from the best to the worst.
    """
    held = [row for row in rows if row.get(factor) is not None]
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in held:
        groups[row[factor]].append(float(row[objective]))
    if not all(_is_number(value) for value in groups):
        levels = [_level(str(value), scores) for value, scores in groups.items()]
        return sorted(levels, key=lambda level: _rank(level.mean, objective))
    if len(groups) <= _MOST_LEVELS:
        return [_level(f"{value:g}", groups[value]) for value in sorted(groups)]
    parts = np.array_split(np.array(sorted(groups)), _RANGES)
    return [
        _level(f"{part[0]:.3g} to {part[-1]:.3g}", [s for value in part for s in groups[value]])
        for part in parts
    ]


def effect(levels: Sequence[Level]) -> float:
    """Return how far the means of a factor's levels lie apart."""
    means = [level.mean for level in levels]
    return max(means) - min(means)


def configurations(
    rows: Iterable[Row], objective: str, *, varied: Sequence[str], most: int
) -> list[Configuration]:
    """Return the best configurations: the best first, then those that lack results.

    A mean over fewer tasks or seeds than others have is not compared with theirs, nor are methods
    that have seen test images with those that have not: they come last.

    Args:
        rows: results.
        objective: what they are compared by.
        varied: names of the factors.
        most: number of configurations.
    """
    told = [name for name in varied if name != "task" and not _is_seed(name)]
    seeds = [name for name in varied if _is_seed(name)]
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row.get(name)) for name in told)].append(row)
    full = max(map(len, groups.values()), default=0)
    means = {
        key: math.fsum(row[objective] for row in group) / len(group)
        for key, group in groups.items()
    }
    order = sorted(
        groups,
        key=lambda key: (
            is_adapted(groups[key][0]),
            len(groups[key]) < full,
            _rank(means[key], objective),
        ),
    )
    return [
        Configuration(
            {name: groups[key][0].get(name) for name in told},
            means[key],
            _over_seeds(groups[key], seeds, objective),
            len(groups[key]),
            str(groups[key][0]["record"]),
        )
        for key in order[:most]
    ]


def by_method_and_task(
    rows: Iterable[Row], objective: str
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return methods, tasks, and the mean of the objective of each method on each task.

    Methods go from the best to the worst by the mean over the tasks; those that have seen test
    images say so, and come last. Nothing where no merge was scored by task.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        task, value = row.get("task"), row.get(objective)
        if row.get("method") and task not in (None, MEAN) and value is not None:
            name = f"{row['method']}{_SEEN if is_adapted(row) else ''}"
            found[name][str(task)].append(float(value))
    tasks = list(dict.fromkeys(task for scores in found.values() for task in scores))
    means = {
        method: {task: math.fsum(values) / len(values) for task, values in scores.items()}
        for method, scores in found.items()
    }
    methods = sorted(
        means,
        key=lambda m: (
            m.endswith(_SEEN),
            _rank(math.fsum(means[m].values()) / len(means[m]), objective),
        ),
    )
    return methods, tasks, [[means[method].get(task) for task in tasks] for method in methods]


def _level(label: str, scores: Sequence[float]) -> Level:
    low, high = np.quantile(scores, (0.1, 0.9))
    return Level(label, math.fsum(scores) / len(scores), float(low), float(high), len(scores))


def _over_seeds(
    rows: Iterable[Row], seeds: Sequence[str], objective: str
) -> tuple[float, float] | None:
    """Return the interval of the mean over seeds, each of which has a mean over tasks."""
    by_seed: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        by_seed[tuple(row.get(name) for name in seeds)].append(float(row[objective]))
    means = [math.fsum(values) / len(values) for values in by_seed.values()]
    if len(means) < 2 or len({len(values) for values in by_seed.values()}) > 1:
        return None
    middle, half = math.fsum(means) / len(means), student_half_width(means)
    return middle - half, middle + half


def _rank(value: float, objective: str) -> float:
    return value if smaller_is_better(objective) else -value


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2].endswith("seed")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _folder(entry: Entry) -> str:
    return str(PurePosixPath(entry.path).parent)
