"""This file judges predictors of merges on what they have not seen, against what they must beat.

    python experiments/prediction.py runs/merges/merges.parquet

Reads the table of `experiments/merges.py`. For each way of holding out (`--splits`), level of
information and predictor it prints Spearman's rank correlation between predicted and measured
outcome, as the mean over folds and pooled; the mean absolute error; what is lost, in points of
mean accuracy, by taking the merge of each group that is predicted best; and for fitted predictors
the share of outcomes within 90 % intervals. Folds, features and settings were fixed before any
outcome was looked at.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mergekit_lit.core.files import write_json
from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.folds import SPLITS, Fold
from mergekit_lit.search.predicting.intervals import calibrated
from mergekit_lit.search.predicting.judging import Judgement, judge, judge_intervals
from mergekit_lit.search.predicting.learning import Outcome, directions_of, rows_of
from mergekit_lit.search.predicting.predictors import (
    Boosting,
    Fit,
    alone,
    constant,
    linear,
    task_mean,
)
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import read_table

# Of an order alone: nothing is fitted, and accuracy is expected to rise in them.
NULLS: Mapping[str, Fit] = {
    "constant": constant,
    "task mean": task_mean,
    "base accuracy": alone("base_val_accuracy"),
    "expert accuracy": alone("own_card_val_accuracy"),
    "-||tau||": alone("own_log_displacement", sign=-1),
    "-K eta": alone("own_log_travel", sign=-1),
    "bound from cards": alone("bound_log_delta_path", sign=-1),
    "bound from data": alone("bound_progress", "bound_drift", "bound_merged_noise", sign=-1),
    "probe accuracy": alone("probe_val_accuracy"),
}
_VALUES = ("constant", "task mean", "base accuracy", "expert accuracy", "probe accuracy")


def main() -> None:
    """Print a table for each way of holding out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path, help="Parquet file of experiments/merges.py")
    parser.add_argument("--outcome", choices=get_args(Outcome), default="accuracy")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--levels", nargs="+", choices=get_args(Level), default=get_args(Level))
    parser.add_argument("--out", type=Path, help="JSON of everything, fold by fold")
    given = parser.parse_args()
    table = read_table(given.table)
    kept: dict[str, Any] = {}
    for split in given.splits:
        print(f"\n### {split}, {given.outcome}\n\n{_HEADER}", flush=True)
        for name, found in judged(table, given.outcome, split, given.levels):
            print(line(name, found), flush=True)
            kept.setdefault(split, {})[name] = asdict(found)
    if given.out:
        write_json(given.out, kept)


def judged(
    table: Sequence[Row], outcome: Outcome, split: str, levels: Sequence[Level]
) -> Iterator[tuple[str, Judgement]]:
    """Yield each predictor's name and how it does."""
    everything = rows_of(table, outcome, level="probe")
    folds = usable(everything, split)
    sign = 1 if outcome == "accuracy" else -1
    for name, fit in NULLS.items() if folds else ():
        fitted = name in ("constant", "task mean")
        order_alone = name not in _VALUES or (outcome != "accuracy" and not fitted)
        turned = fit if sign == 1 or fitted else _turned(fit)
        yield name, judge(folds, turned, order_alone=order_alone)
    for level in levels if folds else ():
        folds = usable(rows_of(table, outcome, level=level), split)
        fits: Mapping[str, Fit] = {"linear": linear, "trees": Boosting(directions_of(outcome))}
        for name, fit in fits.items():
            models = [calibrated(fit, fold.train) for fold in folds]
            yield f"{name}, {level}", judge_intervals(folds, models)


def usable(rows: Rows, split: str) -> list[Fold]:
    """Return the folds that leave something to learn from."""
    return [fold for fold in SPLITS[split](rows) if len(fold.train) and len(fold.test) > 2]


def line(name: str, found: Judgement) -> str:
    """Return one line of the table."""
    per_fold = statistics.fmean(found.per_fold.values())
    lost = f"{100 * statistics.fmean(found.regrets):.1f}" if found.regrets else ""
    cells = [
        name,
        f"{per_fold:.2f}",
        f"{found.pooled:.2f}",
        "" if found.error is None else f"{found.error:.3f}",
        lost,
        "" if found.coverage is None else f"{100 * found.coverage:.0f} %",
        "" if found.merge_coverage is None else f"{100 * found.merge_coverage:.0f} %",
        "" if found.width is None else f"{found.width:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


_HEADER = (
    "| predictor | Spearman, per fold | pooled | mean error | regret, points | rows within "
    "| merges within | width |\n|---|---|---|---|---|---|---|---|"
)


def _turned(fit: Fit) -> Fit:
    """Return the same in the other order."""

    def turned(rows: Rows) -> Any:
        predict = fit(rows)
        return lambda new: -predict(new)

    return turned


if __name__ == "__main__":
    main()
