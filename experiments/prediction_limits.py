"""This file tells what of the merges of a task can be predicted, and what no predictor could.

    python experiments/prediction_limits.py

Reads the shipped table of merges, or that of `--table`, and prints for each backbone and kind of
tasks, as means over tasks: the standard deviation of a task's accuracies, in points; the share of
their variance that lies between groups of experts, and that which a mean by method explains within
groups; the noise of 200 test images, in points; and the rank correlation of a predictor that knew
each merge's accuracy on infinitely many images.

The noise is that of plain averages: what their accuracies on test images do not share with those on
validation images, over the groups of one task. A difference of two merges is less noisy than that
of two models that have nothing in common, as they mostly fail on the same images. What would be
known is drawn from the distribution that, blurred by the noise, is most likely to have given the
accuracies of the task (Kiefer & Wolfowitz 1956, by expectation maximisation).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergekit_lit.search.predicting.columns import KEYS, Row
from mergekit_lit.search.predicting.judging import spearman
from mergekit_lit.search.predicting.rows import Numbers, Words, mean_by
from mergekit_lit.search.predicting.table import SHIPPED, read_table

_POINTS, _STEPS, _DRAWS = 120, 300, 5
_COLUMNS = ("test_accuracy", "probe_val_accuracy")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=SHIPPED)
    rows = read_table(parser.parse_args().table, [*(column.name for column in KEYS), *_COLUMNS])
    print(_HEADER)
    for kind in sorted({(row["backbone"], row["real"]) for row in rows}):
        own = [row for row in rows if (row["backbone"], row["real"]) == kind]
        tasks = [[r for r in own if r["task"] == name] for name in {row["task"]: 0 for row in own}]
        print(line(f"{kind[0]}, {'real' if kind[1] else 'shipped'}", tasks))


def line(name: str, tasks: Sequence[Sequence[Row]]) -> str:
    """Return one line of the table.

    Args:
        name: of the kind.
        tasks: rows of each task, of one backbone.
    """
    noise = noise_of(tasks)
    truth = [_numbers(rows, "test_accuracy") for rows in tasks]
    groups, methods = zip(*(shares(rows) for rows in tasks), strict=True)
    best = [best_rank(values, noise) for values in truth]
    cells = [
        name,
        str(len(tasks)),
        f"{100 * np.mean([values.std() for values in truth]):.1f}",
        f"{np.mean(groups):.2f}",
        f"{np.mean(methods):.2f}",
        f"{100 * noise:.1f}",
        f"{np.mean(best):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def shares(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the shares of a task's variance between groups, and of methods within them."""
    values = _numbers(rows, "test_accuracy")
    within = values - _means(_words(rows, "group"), values)
    by_method = _means(_words(rows, "method"), within)
    return 1 - float(within.var() / values.var()), float(by_method.var() / values.var())


def noise_of(tasks: Sequence[Sequence[Row]]) -> float:
    """Return the standard deviation of the noise of test accuracies.

    Args:
        tasks: rows of each task, of one backbone.
    """
    averages = [[row for row in rows if row["method"] == "average"] for rows in tasks]
    test, val = (
        np.concatenate([_centred(_numbers(rows, name)) for rows in averages]) for name in _COLUMNS
    )
    return float(np.sqrt(max(np.mean(test**2) - np.mean(test * val), 0)))


def best_rank(values: Numbers, noise: float, *, seed: int = 0) -> float:
    """Return the rank correlation of true values with ones that are blurred.

    Args:
        values: of one task, blurred.
        noise: its standard deviation.
        seed: of what is drawn.
    """
    points = np.linspace(values.min(), values.max(), _POINTS)
    like = np.exp(-0.5 * ((values[:, None] - points) / noise) ** 2) + 1e-12
    weights = np.full(_POINTS, 1 / _POINTS)
    for _ in range(_STEPS):
        each = like * weights
        weights = (each / each.sum(axis=1, keepdims=True)).mean(axis=0)
    draw = np.random.default_rng(seed)
    drawn = [draw.choice(points, size=len(values), p=weights) for _ in range(_DRAWS)]
    return float(
        np.mean([spearman(each, each + draw.normal(0, noise, len(each))) for each in drawn])
    )


def _means(labels: Words, values: Numbers) -> Numbers:
    """Return the mean of each value's label."""
    distinct, means = mean_by(labels, values)
    return means[np.searchsorted(distinct, labels)]


def _centred(values: Numbers) -> Numbers:
    return values - values.mean()


def _numbers(rows: Sequence[Row], name: str) -> Numbers:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _words(rows: Sequence[Row], name: str) -> Words:
    return np.array([row[name] for row in rows])


_HEADER = (
    "| backbone, tasks | tasks | deviation, points | between groups | methods within groups "
    "| noise, points | best rank correlation |\n" + 7 * "|---" + "|"
)


if __name__ == "__main__":
    main()
