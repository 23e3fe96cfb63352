"""This file tells what of the predictor of merges helps: the same without one part after another.

    python experiments/prediction_ablation.py

Reads the shipped table of merges, or that of `--table`. Each variant learns from cards and weights
and is judged with tasks left out, as `experiments/prediction.py` does: Spearman's rank correlation
as the mean over folds and pooled, the mean absolute error, and the regret in points: what is lost
by taking the merge of each group whose tasks, predicted one by one, have the best mean. A last line
compares intervals that widen with the expected change with constant ones of the same mean width, by
the share of outcomes that each holds among those that are expected to change by more than .05.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mergekit_lit.search.predicting.columns import Row
from mergekit_lit.search.predicting.folds import Fold, leave_one_task_out
from mergekit_lit.search.predicting.intervals import cross_calibrated
from mergekit_lit.search.predicting.judging import regrets, spearman
from mergekit_lit.search.predicting.learning import directions_of, learned_names, rows_of
from mergekit_lit.search.predicting.predictors import Boosting
from mergekit_lit.search.predicting.rows import Numbers, Rows
from mergekit_lit.search.predicting.table import FEATURES, SHIPPED, read_table

_STRAIGHT = 1e4
"""A unit of change so large that asinh is a straight line."""
_FAR = 0.05


def main() -> None:
    """Print the table, and how many outcomes intervals hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=SHIPPED)
    table = read_table(parser.parse_args().table)
    print("| predictor | per fold | pooled | mean error | regret |\n|---|---|---|---|---|")
    for name, rows, fit in variants(table):
        print(f"| {name} | {' | '.join(scores(rows, fit))} |", flush=True)
    known = built(table).with_features(learned_names("cards"))
    print(f"\n{held(known, Boosting(directions_of('accuracy')))}", flush=True)


def built(table: Sequence[Row]) -> Rows:
    """Return what the predictor learns from, as it is built."""
    every = [column.name for column in FEATURES["cards"]]
    rows = rows_of(table, "accuracy", level="cards", more=every)
    return rows.at(np.flatnonzero(np.isfinite(rows.change)))


def variants(table: Sequence[Row]) -> Iterator[tuple[str, Rows, Boosting]]:
    """Yield each variant: its name, what it learns from, and how."""
    everything = built(table)
    known = everything.with_features(learned_names("cards"))
    monotone = Boosting(directions_of("accuracy"))
    count = len(everything.names)
    straight = unaware(replace(known, unit=_STRAIGHT))
    yield (
        f"all {count} features, change from the expert's accuracy on its card",
        told_from(unaware(replace(everything, unit=_STRAIGHT)), "own_card_val_accuracy"),
        monotone,
    )
    yield (
        f"{len(known.names)} features, most of them ratios, the same change",
        told_from(straight, "own_card_val_accuracy"),
        monotone,
    )
    yield (
        "change from the base's accuracy on the card",
        told_from(straight, "own_card_base_accuracy"),
        monotone,
    )
    yield "learned as change from the base's accuracy on the same test images", straight, monotone
    yield "as asinh of it", unaware(known), monotone
    yield "knowing the method: as built", known, monotone
    yield f"as built, with all {count} features", everything, monotone
    yield "as built, not monotone", known, Boosting({})


def unaware(rows: Rows) -> Rows:
    """Return rows that do not tell the method."""
    return replace(rows, method=np.full(len(rows), "any"))


def told_from(rows: Rows, name: str) -> Rows:
    """Return rows whose outcome is learned as, and told as, the change from a feature."""
    start = rows.column(name)
    return replace(rows, start=start, anchor=start)


def scores(rows: Rows, fit: Boosting) -> list[str]:
    """Return the cells of a line: ranks per fold and pooled, error, regret."""
    folds = list(leave_one_task_out(rows))
    found = [fit(fold.train)(fold.test) for fold in folds]
    ranks = [spearman(f.test.outcome, p) for f, p in zip(folds, found, strict=True)]
    truth, predicted = np.concatenate([f.test.outcome for f in folds]), np.concatenate(found)
    lost = regrets(joined(rows, folds), predicted)
    return [
        f"{statistics.fmean(ranks):.2f}",
        f"{spearman(truth, predicted):.2f}",
        f"{np.abs(truth - predicted).mean():.3f}",
        f"{100 * statistics.fmean(lost):.1f}",
    ]


def joined(rows: Rows, folds: Sequence[Fold]) -> Rows:
    """Return all rows in the order of the folds that judge them."""
    place = {key: i for i, key in enumerate(zip(rows.merge, rows.task, strict=True))}
    keys = [key for f in folds for key in zip(f.test.merge, f.test.task, strict=True)]
    return rows.at(np.array([place[key] for key in keys]))


def held(rows: Rows, fit: Boosting) -> str:
    """Return how many outcomes lie within intervals, among those that are expected to be far."""
    folds = list(leave_one_task_out(rows))
    models = cross_calibrated(fit, folds)
    found = [model.rows(fold.test) for model, fold in zip(models, folds, strict=True)]
    truth = np.concatenate([fold.test.outcome for fold in folds])
    anchor = np.concatenate([fold.test.anchor for fold in folds])
    value, low, high = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("value", "low", "high")
    )
    same = float((high - low).mean()) / 2
    far = np.abs(value - anchor) > _FAR
    constant = _share(np.abs(truth - value) <= same, far)
    widening = _share((low <= truth) & (truth <= high), far)
    return (
        f"Of {int(far.sum())} of {len(truth)} rows that are expected to change by more than "
        f"{_FAR:g}, intervals of constant width hold {constant}, widening ones {widening}."
    )


def _share(inside: Numbers, of: Numbers) -> str:
    return f"{100 * float(inside[of].mean()):.0f} %"


if __name__ == "__main__":
    main()
