"""This file predicts what merges of given experts will reach, with intervals and what they rest on.

Nothing is scored: experts are merged in memory, and what cards and deltas tell of each merge is
compared with a table of merges that were measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.records import Record, Stopwatch, plain
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.search.predicting.cards import of_cards
from mergekit_lit.search.predicting.columns import Level, Row, joined
from mergekit_lit.search.predicting.deltas import angles_of, of_deltas, of_step
from mergekit_lit.search.predicting.intervals import LEVEL, Calibrated, calibrated
from mergekit_lit.search.predicting.learning import Outcome, directions_of, rows_of
from mergekit_lit.search.predicting.nearest import nearest
from mergekit_lit.search.predicting.predictors import Boosting
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import feature_names, read_table
from mergekit_lit.stages.folders import check_record
from mergekit_lit.stages.opening import base_of
from mergekit_lit.stages.recipes import Recipe, check_methods, check_recipe, merge_recipe

_LEVEL: Level = "cards"
_LEAST_ROWS = 200
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
    table: Path,
    base: str | None = None,
    allow_different_base: bool = False,
    out: Path | None = None,
) -> Record:
    """Predict accuracy and excess error of merges of the same experts, from cards and deltas alone.

    The prediction is that of boosted trees that were fitted to measured merges, with only those
    features that are known here: the less cards tell, the wider the intervals.

    Args:
        experts: one file per expert, each of another task, all of one base.
        recipes: the merges; their methods look at no images.
        table: measured merges, from `experiments/merges.py`.
        base: the base, if not the one that the first card names.
        allow_different_base: whether to take experts whose card names another base, or none.
        out: file of the record; None writes none.

    Returns:
        A record, whose metrics are `merges`: name, method, `accuracy` and `excess_error` on average
        over the tasks with `low` and `high`, the same for each of its `tasks`, and the `nearest`
        measured rows; and `unknown`: features that nobody could tell.

    Raises:
        FileNotFoundError: an expert or the table is missing.
        KeyError: unknown method or parameter.
        ModuleNotFoundError: scikit-learn or pyarrow is not installed.
        ValueError: experts that cannot be merged, a method that looks at images, or no recipe.
    """
    watch = Stopwatch()
    if out is not None:
        check_record(out, "predict")
    check_methods(recipes)
    for recipe in recipes:
        check_recipe(recipe, None)
    measured = read_table(table)
    opened = in_memory(
        load_experts(
            experts, base=base_of(experts, base), allow_different_base=allow_different_base
        )
    )
    new = list(known_rows(opened, recipes))
    unknown = [name for name in feature_names(_LEVEL) if all(np.isnan(row[name]) for row in new)]
    found = {outcome: _predicted(measured, new, outcome, unknown) for outcome in _OUTCOMES}
    merges = [_told(place, recipe, found, measured) for place, recipe in enumerate(recipes)]
    record = watch.finish(
        Record(
            stage="predict",
            name=out.stem.removesuffix(".record") if out else "predict",
            config=plain({"recipes": [asdict(recipe) for recipe in recipes], "level": _LEVEL}),
            metrics={"merges": merges, "unknown": unknown, "level": LEVEL},
        )
    )
    if out is not None:
        record.write(out)
    return record


def known_rows(experts: Experts, recipes: Sequence[Recipe]) -> Iterator[Row]:
    """Yield a row a merge and task: what cards, deltas and the merge's step tell."""
    angles = of_deltas(experts, angles_of(experts))
    for place, recipe in enumerate(recipes):
        merged = merge_recipe(experts, recipe, None, {})
        keys = [
            {
                "backbone": experts.backbone,
                "suite": card.suite or "",
                "real": False,
                "group": "",
                "merge": place,
                "task": name,
            }
            for name, card in zip(experts.names, experts.cards, strict=True)
        ]
        yield from joined(keys, of_cards(experts, merged), angles, of_step(experts, merged))


@dataclass(frozen=True)
class _Found:
    """What was predicted of one outcome."""

    model: Calibrated
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

    def nearest(self, place: int) -> list[int]:
        """Return the places of the measured rows that are most like one merge."""
        return nearest(self.known, self._of(place))

    def _of(self, place: int) -> Rows:
        return self.new.at(np.char.endswith(self.new.merge, f"/{place}"))


def _predicted(
    measured: Sequence[Row], new: Sequence[Row], outcome: Outcome, unknown: Sequence[str]
) -> _Found:
    known = rows_of(measured, outcome, level=_LEVEL, without=unknown)
    known = known.at(np.isfinite(known.outcome))
    if len(known) < _LEAST_ROWS:
        raise ValueError(
            f"`table` must hold {_LEAST_ROWS} measured rows or more to learn from, but holds "
            f"{len(known)}. Build more of it: python experiments/merges.py."
        )
    return _Found(
        calibrated(Boosting(directions_of(outcome)), known),
        known,
        rows_of(new, outcome, level=_LEVEL, without=unknown),
    )


def _told(
    place: int, recipe: Recipe, found: Mapping[Outcome, _Found], measured: Sequence[Row]
) -> dict[str, Any]:
    """Return one merge's predictions."""
    like = found["accuracy"].nearest(place)
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
        "nearest": [
            {**{key: measured[i][key] for key in keys}, "accuracy": measured[i]["test_accuracy"]}
            for i in like
        ],
    }
