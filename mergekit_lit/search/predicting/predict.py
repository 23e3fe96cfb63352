"""This file predicts what merges of given experts will reach, with intervals and what they rest on.

The merges are not scored: experts are merged in memory, and what cards and deltas tell of each
merge, and images if there are some, is compared with a table of merges that were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.intervals import LEVEL, Calibrated, calibrated
from mergekit_lit.search.predicting.learning import Outcome, directions_of, rows_of
from mergekit_lit.search.predicting.looking import known_rows, open_experts
from mergekit_lit.search.predicting.nearest import nearest
from mergekit_lit.search.predicting.predictors import Boosting
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import feature_names, read_table
from mergekit_lit.stages.advice import expert_cautions
from mergekit_lit.stages.folders import check_folder, check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe, check_methods, check_recipe
from mergekit_lit.stages.report import build_report

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
    table: Path,
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
        table: measured merges, from `experiments/merges.py`.
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
        could tell; `coverage`, the share of outcomes that the intervals are to hold; and
        `warnings`, what makes these experts merge badly.

    Raises:
        FileNotFoundError: an expert or the table is missing.
        KeyError: unknown method or parameter.
        ModuleNotFoundError: scikit-learn or pyarrow is not installed.
        ValueError: experts that cannot be merged, a method that looks at images where there are
            none, or no recipe.
    """
    watch = Stopwatch()
    path = _record_path(out)
    check_methods(recipes)
    for recipe in recipes:
        check_recipe(recipe, None if level == "cards" else calibration)
    measured = read_table(table)
    opened, looked = open_experts(
        experts, level, calibration, base=base, allow_different_base=allow_different_base
    )
    new = list(known_rows(opened, recipes, looked))
    unknown = [name for name in feature_names(level) if all(np.isnan(row[name]) for row in new)]
    found = {outcome: _predicted(measured, new, outcome, level, unknown) for outcome in _OUTCOMES}
    merges = [_told(place, recipe, found, measured, new) for place, recipe in enumerate(recipes)]
    record = watch.finish(
        Record(
            stage="predict",
            name=path.stem.removesuffix(".record") if path else "predict",
            config={
                "experts": list(map(str, experts)),
                "recipes": [asdict(recipe) for recipe in recipes],
                "table": str(table),
                "level": level,
                "base": base,
                "allow_different_base": allow_different_base,
                "calibration": asdict(calibration) if calibration else None,
            },
            metrics={
                "merges": merges,
                "unknown": unknown,
                "coverage": LEVEL,
                "warnings": expert_cautions(experts),
            },
        )
    )
    if path is not None:
        record.write(path)
        if path != out:
            build_report(path.parent, title="What merges are expected to reach")
    return record


def _record_path(out: Path | None) -> Path | None:
    """Return where the record goes."""
    if out is None:
        return None
    path = out if out.suffix == ".json" else out / "predict.record.json"
    if path != out:
        check_folder(out)
    check_record(path, "predict")
    return path


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
    measured: Sequence[Row],
    new: Sequence[Row],
    outcome: Outcome,
    level: Level,
    unknown: Sequence[str],
) -> _Found:
    known = rows_of(measured, outcome, level=level, without=unknown)
    known = known.at(np.isfinite(known.outcome))
    if len(known) < _LEAST_ROWS:
        raise ValueError(
            f"`table` must hold {_LEAST_ROWS} measured rows or more to learn from, but holds "
            f"{len(known)}. Build more of it: python experiments/merges.py."
        )
    return _Found(
        calibrated(Boosting(directions_of(outcome)), known),
        known,
        rows_of(new, outcome, level=level, without=unknown),
    )


def _told(
    place: int,
    recipe: Recipe,
    found: Mapping[Outcome, _Found],
    measured: Sequence[Row],
    new: Sequence[Row],
) -> dict[str, Any]:
    """Return one merge's predictions, and what they rest on."""
    own = next(row for row in new if row["merge"] == place)
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
        "terms": {
            name.removeprefix(_BOUND): None if np.isnan(value) else value
            for name, value in own.items()
            if name.startswith(_BOUND)
        },
        "nearest": [
            {**{key: measured[i][key] for key in keys}, "accuracy": measured[i]["test_accuracy"]}
            for i in like
        ],
    }
