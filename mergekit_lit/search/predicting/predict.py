"""This file predicts what merges of given experts will reach, with intervals and what they rest on.

The merges are not scored: experts are merged in memory, and what cards and deltas tell of each
merge, and images if there are some, is compared with a table of merges that were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lit.core.files import file_hash
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.intervals import Calibrated, calibrated
from mergekit_lit.search.predicting.learning import (
    SCALES,
    Outcome,
    directions_of,
    learned_names,
    needed_columns,
    rows_of,
)
from mergekit_lit.search.predicting.looking import known_rows, open_experts
from mergekit_lit.search.predicting.nearest import nearest
from mergekit_lit.search.predicting.predictors import Boosting
from mergekit_lit.search.predicting.recording import record_path, recorded
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import SHIPPED, read_table, table_file
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import several_bases
from mergekit_lit.stages.recipes import Recipe, check_methods, check_recipe

_LEAST_ROWS = 200
_BOUND = "bound_"
_OUTCOMES: tuple[Outcome, ...] = ("accuracy", "excess_error")


@dataclass(frozen=True)
class Interval:
    """A predicted value with its 90 % interval."""

    value: float
    low: float
    high: float


def predict_files(
    experts: Sequence[Path],
    recipes: Sequence[Recipe],
    *,
    table: Path = SHIPPED,
    level: Level = "cards",
    calibration: Calibration | None = None,
    base: str | None = None,
    allow_different_base: bool = False,
    out: Path | None = None,
) -> Record:
    """Predict accuracy and excess error of merges of the same experts, without scoring them.

    The prediction is that of boosted trees that were fitted to measured merges, with only those
    features that are known here: the less is known, the wider the intervals.

    Args:
        experts: one file per expert, each of another task, all of one base.
        recipes: the merges; from cards alone, of methods that look at no images.
        table: measured merges, from `experiments/merges.py`; those that ship by default.
        level: what is looked at: `cards` and weights; `data`, training and validation images too;
            `probe`, the plain average's scores on them as well.
        calibration: where the images come from, for the levels that look at some.
        base: the base, if not the one that the first card names.
        allow_different_base: whether to take experts whose card names another base, or none.
        out: folder of `predict.record.json` and of the page `report.html`; or the record's file,
            ending in `.json`. None writes nothing.

    Returns:
        A record, whose metrics are `merges`: name, method, `accuracy` and `excess_error` on average
        over the tasks with `low` and `high`, the same for each of its `tasks`, `terms` of the bound
        and what drives them, and the `nearest` measured rows; `unknown`, the features that nobody
        could tell; `measured`, groups and merges that were learned from, and their table's hash;
        `coverage`, the share of outcomes that the intervals are to hold; and `warnings`, what makes
        these experts merge badly.

    Raises:
        FileNotFoundError: an expert or the table is missing.
        KeyError: unknown method or parameter.
        ModuleNotFoundError: scikit-learn or pyarrow is not installed.
        ValueError: experts that cannot be merged, a method that looks at images where there are
            none, or no recipe.
    """
    watch = Stopwatch()
    # Before any work.
    record_path(out)
    if several_bases(experts):
        raise ValueError(
            "Experts must be of one base for measured merges to tell of theirs, but their cards "
            "name several. Take `predict_initialisations`, which compares bases."
        )
    check_methods(recipes)
    for recipe in recipes:
        check_recipe(recipe, None if level == "cards" else calibration)
    measured = read_table(table, needed_columns(level))
    opened, looked = open_experts(
        experts, level, calibration, base=base, allow_different_base=allow_different_base
    )
    new = list(known_rows(opened, recipes, looked))
    unknown = _unknown(new, level)
    found = {outcome: _predicted(measured, new, outcome, level, unknown) for outcome in _OUTCOMES}
    merges = [_told(place, recipe, found, new) for place, recipe in enumerate(recipes)]
    return recorded(
        watch,
        out,
        experts,
        calibration,
        config={
            "recipes": [asdict(recipe) for recipe in recipes],
            "table": str(table),
            "level": level,
            "base": base,
            "allow_different_base": allow_different_base,
        },
        metrics={
            "merges": merges,
            "unknown": unknown,
            "measured": {
                **_counts(found["accuracy"].known),
                "sha256": file_hash(table_file(table)),
            },
        },
        title="What merges are expected to reach",
    )


@dataclass(frozen=True)
class _Found:
    """What was predicted of one outcome."""

    model: Calibrated
    measured: Sequence[Row]
    known: Rows
    new: Rows

    def merge(self, place: int) -> Interval:
        """Return the mean over the tasks of one merge."""
        found = self.model.merges(self._of(place))
        return Interval(float(found.value[0]), float(found.low[0]), float(found.high[0]))

    def tasks(self, place: int) -> dict[str, Interval]:
        """Return each task of one merge."""
        found = self.model.rows(self._of(place))
        each = zip(found.labels, found.value, found.low, found.high, strict=True)
        return {str(task): Interval(float(v), float(a), float(b)) for task, v, a, b in each}

    def nearest(self, place: int) -> list[Row]:
        """Return the measured rows that are most like one merge."""
        return [self.measured[i] for i in nearest(self.known, self._of(place))]

    def _of(self, place: int) -> Rows:
        return self.new.at(np.char.endswith(self.new.merge, f"/{place}"))


def _predicted(
    measured: Sequence[Row],
    new: Sequence[Row],
    outcome: Outcome,
    level: Level,
    unknown: Sequence[str],
) -> _Found:
    found = rows_of(measured, outcome, level=level, without=unknown)
    places = np.flatnonzero(np.isfinite(found.change) & np.isfinite(found.anchor))
    if len(places) < _LEAST_ROWS:
        raise ValueError(
            f"`table` must hold {_LEAST_ROWS} measured rows or more to learn from, but holds "
            f"{len(places)}. Build more of it: python experiments/merges.py."
        )
    known = found.at(places)
    return _Found(
        calibrated(Boosting(directions_of(outcome)), known),
        [measured[int(i)] for i in places],
        known,
        rows_of(new, outcome, level=level, without=unknown),
    )


def _unknown(new: Sequence[Row], level: Level) -> list[str]:
    """Return what cannot be learned from: what no new row knows, or not all where all must."""
    starts = {name for scale in SCALES.values() for name, _ in scale.starts}
    return [
        name
        for name in learned_names(level)
        if (any if name in starts else all)(np.isnan(row[name]) for row in new)
    ]


def _counts(known: Rows) -> dict[str, int]:
    return {"groups": len(np.unique(known.group)), "merges": len(np.unique(known.merge))}


def _told(
    place: int,
    recipe: Recipe,
    found: Mapping[Outcome, _Found],
    new: Sequence[Row],
) -> dict[str, Any]:
    """Return one merge's predictions, and what they rest on."""
    own = next(row for row in new if row["merge"] == place)
    tasks = {outcome: each.tasks(place) for outcome, each in found.items()}
    keys = ("backbone", "method", "config", "tasks", "task", "expert")
    return {
        "method": recipe.method,
        "config": dict(recipe.config),
        **{outcome: asdict(each.merge(place)) for outcome, each in found.items()},
        "tasks": {
            task: {outcome: asdict(tasks[outcome][task]) for outcome in found}
            for task in tasks["accuracy"]
        },
        "terms": {
            name.removeprefix(_BOUND): None if np.isnan(value) else value
            for name, value in own.items()
            if name.startswith(_BOUND)
        },
        "nearest": [
            {**{key: row[key] for key in keys}, "accuracy": row["test_accuracy"]}
            for row in found["accuracy"].nearest(place)
        ],
    }
