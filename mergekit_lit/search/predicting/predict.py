"""This file predicts what merges of given experts will reach, with intervals and what they rest on.

The merges are not scored: experts are merged in memory, and what cards and deltas tell of each
merge, and images if there are some, is compared with a table of merges that were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lit.core.files import file_hash
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.gaps import Gaps, gaps_of
from mergekit_lit.search.predicting.intervals import (
    Calibrated,
    calibrated,
    held_out,
    merges_of,
)
from mergekit_lit.search.predicting.learning import (
    Outcome,
    directions_of,
    needed_columns,
    rows_of,
)
from mergekit_lit.search.predicting.looking import known_rows, open_experts
from mergekit_lit.search.predicting.nearest import nearest
from mergekit_lit.search.predicting.predictors import Boosting, check_trees
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

    The prediction is that of boosted trees that were fitted to measured merges. Tasks of which
    features are unknown are predicted by trees that were fitted without exactly these. Their
    intervals are never narrower, in the mean over measured tasks that are held out, than those of
    trees that know them; the mean of a merge takes the largest width of its tasks.

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
        and what drives them, and the `nearest` measured rows; `backbone`, that of the experts;
        `unknown`, the features that nobody could tell of some task, and `unknown_of`, those of each
        task; `measured`, groups and merges that were learned from, and their table's hash;
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
    check_trees()
    measured = read_table(table, needed_columns(level))
    opened, looked = open_experts(
        experts, level, calibration, base=base, allow_different_base=allow_different_base
    )
    new = list(known_rows(opened, recipes, looked))
    gaps = gaps_of(new, level)
    found = {outcome: _predicted(measured, new, outcome, level, gaps) for outcome in _OUTCOMES}
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
            "backbone": opened.backbone,
            "unknown": gaps.names,
            "unknown_of": {task: list(names) for task, names in gaps.unknown.items() if names},
            "measured": {
                **found["accuracy"].counts(),
                "sha256": file_hash(table_file(table)),
            },
        },
        title="What merges are expected to reach",
    )


@dataclass(frozen=True)
class _Part:
    """What was learned for tasks of which the same is known.

    Attributes:
        model: the predictor.
        known: what it was fitted to.
        new: the tasks' rows.
    """

    model: Calibrated
    known: Rows
    new: Rows


@dataclass(frozen=True)
class _Found:
    """What was predicted of one outcome.

    Attributes:
        parts: each of some tasks.
        measured: rows of the table.
        known: the same, with the features that any new merge has.
        new: rows of all tasks, with the same features.
    """

    parts: Sequence[_Part]
    measured: Sequence[Row]
    known: Rows
    new: Rows

    def merge(self, place: int) -> Interval:
        """Return the mean over the tasks of one merge."""
        found = merges_of([(part.model, _at(part.new, place)) for part in self.parts])
        return Interval(float(found.value[0]), float(found.low[0]), float(found.high[0]))

    def tasks(self, place: int) -> dict[str, Interval]:
        """Return each task of one merge, in the order of the experts."""
        told: dict[str, Interval] = {}
        for part in self.parts:
            found = part.model.rows(_at(part.new, place))
            each = zip(found.labels, found.value, found.low, found.high, strict=True)
            told |= {str(task): Interval(float(v), float(a), float(b)) for task, v, a, b in each}
        return {str(task): told[str(task)] for task in _at(self.new, place).task}

    def nearest(self, place: int) -> list[Row]:
        """Return the measured rows that are most like one merge."""
        return [self.measured[i] for i in nearest(self.known, _at(self.new, place))]

    def counts(self) -> dict[str, int]:
        """Return how many groups and merges were learned from."""
        group, merge = (
            np.concatenate([getattr(part.known, name) for part in self.parts])
            for name in ("group", "merge")
        )
        return {"groups": len(np.unique(group)), "merges": len(np.unique(merge))}


def _predicted(
    measured: Sequence[Row], new: Sequence[Row], outcome: Outcome, level: Level, gaps: Gaps
) -> _Found:
    fit = Boosting(directions_of(outcome))
    whole = rows_of(measured, outcome, level=level, without=gaps.absent)
    learnable = _learnable(whole)
    # It costs as much as a calibration, hence only where something is unknown.
    compared = bool(gaps.names) and len(learnable) >= _LEAST_ROWS
    at_least = held_out(fit, learnable) if compared else ()
    parts = []
    for unknown, tasks in gaps.parts().items():
        left_out = (*gaps.absent, *unknown)
        known = _learnable(rows_of(measured, outcome, level=level, without=left_out))
        _check_enough(known)
        # Where nothing more is unknown, these rows are those of `at_least`.
        held, least = ((), at_least) if unknown else (at_least, ())
        model = calibrated(fit, known, held=held, at_least=least)
        rows = [row for row in new if row["task"] in tasks]
        parts.append(_Part(model, known, _new_rows(rows, outcome, level, left_out)))
    places = np.flatnonzero(np.isfinite(whole.outcome))
    return _Found(
        parts,
        [measured[int(i)] for i in places],
        whole.at(places),
        _new_rows(new, outcome, level, gaps.absent),
    )


def _learnable(rows: Rows) -> Rows:
    """Return the rows that can be learned from."""
    return rows.at(np.isfinite(rows.change) & np.isfinite(rows.anchor))


def _check_enough(known: Rows) -> None:
    if len(known) < _LEAST_ROWS:
        raise ValueError(
            f"`table` must hold {_LEAST_ROWS} measured rows or more to learn from, but holds "
            f"{len(known)}. Build more of it: python experiments/merges.py."
        )


def _new_rows(new: Sequence[Row], outcome: Outcome, level: Level, without: Sequence[str]) -> Rows:
    """Return rows of new merges, each merge by its place: cards may name several suites."""
    rows = rows_of(new, outcome, level=level, without=without)
    return replace(rows, merge=np.array([str(row["merge"]) for row in new]))


def _at(rows: Rows, place: int) -> Rows:
    return rows.at(rows.merge == str(place))


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
