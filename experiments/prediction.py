"""This file judges predictors of merges on what they have not seen, against what they must beat.

    python experiments/prediction.py --out runs/prediction

Reads the shipped table of merges, or that of `--table`, which `experiments/merges.py` writes. For
each way of holding out (`--splits`), level of information and predictor it prints Spearman's rank
correlation between predicted and measured outcome, as the mean over folds, within each task of one
backbone, and pooled, with 90 % bootstrap intervals; the mean absolute error; what is lost, in
points of accuracy, by taking the merge of each group that is predicted best; and for fitted
predictors the share of outcomes within 90 % intervals, and how wide these are. Each part is kept as
a file in `--out`; what is there is not judged again, so that a killed run goes on. `--page` writes
a page with figures of them.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mergekit_lit.core.files import file_hash, read_json, write_json, write_text
from mergekit_lit.reports.markup import document, section
from mergekit_lit.reports.whiskers import whiskers
from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.folds import SPLITS, Fold
from mergekit_lit.search.predicting.intervals import Calibrated, calibrated, cross_calibrated
from mergekit_lit.search.predicting.judging import Judgement, judge, judge_intervals
from mergekit_lit.search.predicting.learning import (
    Outcome,
    directions_of,
    needed_columns,
    rows_of,
)
from mergekit_lit.search.predicting.predictors import (
    Boosting,
    Fit,
    alone,
    always,
    constant,
    linear,
    method_mean,
    task_mean,
)
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import SHIPPED, read_table, table_file

# What is fitted, and what is a value of accuracy; all others are of an order alone.
_FITTED: Mapping[str, Fit] = {
    "constant": constant,
    "task mean": task_mean,
    "method mean": method_mean,
}
_VALUES: Mapping[str, Fit] = {
    "base accuracy": alone("own_card_base_accuracy"),
    "expert accuracy": alone("own_card_val_accuracy"),
    "probe accuracy": alone("probe_val_accuracy"),
}
_ORDERS: Mapping[str, Fit] = {
    "-||tau||": alone("own_log_displacement", sign=-1),
    "-K eta": alone("own_log_travel", sign=-1),
    "bound from cards": alone("bound_log_delta_path", sign=-1),
    "bound from data": alone("bound_progress", "bound_drift", "bound_merged_noise", sign=-1),
    "always the average": always("average"),
}
_BESIDE = ("own_log_travel", "bound_progress")
_NULLS = "nulls"
_FEW_FOLDS = 5


def main() -> None:
    """Judge what is missing, and print a table for each way of holding out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=SHIPPED)
    parser.add_argument("--outcome", choices=get_args(Outcome), default="accuracy")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--levels", nargs="+", choices=get_args(Level), default=get_args(Level))
    parser.add_argument("--out", type=Path, default=Path("runs/prediction"))
    parser.add_argument("--page", type=Path, help="HTML page of figures; none without it")
    given = parser.parse_args()
    table = read_table(given.table, needed_columns("probe", _BESIDE))
    about = {"table": file_hash(table_file(given.table)), "outcome": given.outcome}
    sections = []
    for split in given.splits:
        of_split: dict[str, dict[str, Any]] = {}
        print(f"\n### {split}, {given.outcome}\n\n{_HEADER}", flush=True)
        for part in (_NULLS, *given.levels):
            path = given.out / f"{given.outcome}-{split.replace(' ', '-')}-{part}.json"
            for name, found in kept(path, about, table, given.outcome, split, part).items():
                print(line(name, found), flush=True)
                of_split[name] = found
        sections.append(drawn(split, of_split))
    if given.page:
        title = f"Predictions of merged {given.outcome} on what was held out"
        write_text(given.page, document(title, *sections))


def kept(
    path: Path, about: Mapping[str, str], table: Sequence[Row], outcome: Outcome, *what: str
) -> dict[str, dict[str, Any]]:
    """Return the judgements of one part from its file; make it if it is of another table."""
    if path.is_file() and (old := read_json(path))["about"] == about:
        return dict(old["predictors"])  # Pairs: their order is told, too.
    found = {name: told(each) for name, each in judged(table, outcome, *what)}
    write_json(path, {"about": about, "predictors": list(found.items())})
    return found


def judged(
    table: Sequence[Row], outcome: Outcome, split: str, part: str
) -> Iterator[tuple[str, Judgement]]:
    """Yield each predictor's name and how it does: nulls, or what is fitted at a level."""
    if part == _NULLS:
        yield from _nulls(table, outcome, split)
        return
    folds = usable(rows_of(table, outcome, level=part), split)  # type: ignore[arg-type] # a level
    fits: Mapping[str, Fit] = {"linear": linear, "trees": Boosting(directions_of(outcome))}
    for name, fit in fits.items() if folds else ():
        yield f"{name}, {part}", judge_intervals(folds, _models(fit, folds))


def _models(fit: Fit, folds: Sequence[Fold]) -> list[Calibrated]:
    """Return what is learned for each fold; one of few says little of another."""
    if len(folds) < _FEW_FOLDS:
        return [calibrated(fit, fold.train) for fold in folds]
    return cross_calibrated(fit, folds)


def _nulls(table: Sequence[Row], outcome: Outcome, split: str) -> Iterator[tuple[str, Judgement]]:
    folds = usable(rows_of(table, outcome, level="probe", more=_BESIDE), split)
    if not folds:
        return
    for name, fit in _FITTED.items():
        yield name, judge(folds, fit)
    rising = outcome == "accuracy"
    for name, fit in (_VALUES | _ORDERS).items():
        yield (
            name,
            judge(
                folds,
                fit if rising else _turned(fit),
                order_alone=name in _ORDERS or not rising,
            ),
        )


def told(found: Judgement) -> dict[str, Any]:
    """Return a judgement as it is kept: the mean regret stands for all."""
    kept = asdict(found)
    regrets = kept.pop("regrets")
    return {**kept, "regret": statistics.fmean(regrets) if regrets else None}


def usable(rows: Rows, split: str) -> list[Fold]:
    """Return the folds that leave something to learn from, of rows whose outcomes are known."""
    rows = rows.at(np.flatnonzero(np.isfinite(rows.change)))
    return [fold for fold in SPLITS[split](rows) if len(fold.train) and len(fold.test) > 2]


def line(name: str, found: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    lost = found["regret"]
    cells = [
        name,
        _within(statistics.fmean(found["per_fold"].values()), found["per_fold_within"], 1, 2),
        f"{statistics.fmean(found['per_cell'].values()):.2f}",
        _within(found["pooled"], found["pooled_within"], 1, 2),
        "" if found["error"] is None else f"{found['error']:.3f}",
        "" if lost is None else _within(100 * lost, found["regret_within"], 100, 1),
        "" if found["coverage"] is None else f"{100 * found['coverage']:.0f} %",
        "" if found["merge_coverage"] is None else f"{100 * found['merge_coverage']:.0f} %",
        "" if found["width"] is None else f"{found['width']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _within(value: float, ends: Sequence[float], unit: int, digits: int) -> str:
    low, high = (f"{unit * end:.{digits}f}" for end in ends)
    return f"{value:.{digits}f} [{low}, {high}]"


_HEADER = (
    "| predictor | Spearman, per fold | per task and backbone | pooled | mean error "
    "| regret, points | rows within | merges within | width |\n" + 9 * "|---" + "|"
)


def drawn(split: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures of one way of holding out: how well each ranks, and what it loses."""
    ranks = {
        name: (statistics.fmean(each["per_fold"].values()), each["per_fold_within"])
        for name, each in found.items()
    }
    lost = {
        name: (100 * each["regret"], [100 * end for end in each["regret_within"]])
        for name, each in found.items()
        if each["regret"] is not None
    }
    panels = (("Spearman, mean over folds", ranks), ("regret in points", lost))
    return section(split, *(_panel(heading, rows, split) for heading, rows in panels if rows))


def _panel(heading: str, rows: Mapping[str, tuple[float, Sequence[float]]], split: str) -> str:
    fitted = tuple(get_args(Level))
    return whiskers(
        f"{heading}, with 90 % intervals",
        [
            (
                name,
                {"value": value, "low": ends[0], "high": ends[1]},
                "merged" if name.endswith(fitted) else "expert",
            )
            for name, (value, ends) in rows.items()
        ],
        title=f"{split}: {heading}",
    )


def _turned(fit: Fit) -> Fit:
    """Return the same in the other order."""

    def turned(rows: Rows) -> Any:
        predict = fit(rows)
        return lambda new: -predict(new)

    return turned


if __name__ == "__main__":
    main()
