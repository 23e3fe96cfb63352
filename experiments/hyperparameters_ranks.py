"""This file is rank correlations of the bound's terms, and of nulls, with the loss and the gap.

It is a module of `experiments/hyperparameters_report.py`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from correlations import pooled_and_within
from exponents import Row, grouped, usual_size
from markdown import table


def ranks(by_backbone: Mapping[str, Sequence[Row]]) -> str:
    """Return rank correlations of terms, and of what needs no theory, with loss and gap.

    Over configurations and step counts, each a mean over seeds and groups of the usual size; pooled
    and, in brackets, as the mean within one number of steps.
    """
    means = {name: _means(rows) for name, rows in by_backbone.items()}
    means = {name: each for name, each in means.items() if len(each) > 2}
    if not means:
        return ""
    of = [f"{name}: {what}" for name in means for what in ("test loss", "gap beyond the base's")]
    lines = [
        [about, *(_told(each, name, w) for each in means.values() for w in ("test_loss", "added"))]
        for name, about in _PREDICTORS.items()
    ]
    return table(["Spearman with", *of], lines)


def _means(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Return means over seeds and groups of the usual size."""
    size = usual_size(rows)
    cells = grouped(
        [row for row in rows if row["size"] == size], "lr", "batch", "train_share", "steps"
    )
    return [
        {name: _mean(each, name) for name in _RANKED}
        | {"added": statistics.fmean(row["gap"] - row["base_gap"] for row in each)}
        | {"K eta": each[0]["steps"] * each[0]["lr"]}
        for each in cells.values()
    ]


def _mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean over the rows that know a number; NaN where none does."""
    # Tables of other versions may lack a column.
    known = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return statistics.fmean(known) if known else math.nan


_RANKED = (
    *("lr", "steps", "test_loss", "total_path", "drift", "generalization_path", "eps_path"),
    *("merged_gradient", "displacement", "experts_train_loss", "experts_accuracy", "train_loss"),
    *("descent", "total_by_step_path"),
)
_PREDICTORS = {
    "total_path": "total, with Delta by the path estimate",
    "total_by_step_path": "total by the step, with the same Delta",
    "descent": "descent",
    "drift": "drift",
    "generalization_path": "generalization, by the path estimate",
    "eps_path": "eps_path",
    "merged_gradient": "merged gradient (of the first group)",
    "K eta": "K eta (null)",
    "displacement": "displacement (null)",
    "experts_train_loss": "experts' train loss (null)",
    "experts_accuracy": "experts' test accuracy (null)",
}


def _told(means: Sequence[Mapping[str, float]], name: str, of: str) -> str:
    """Return the correlation pooled, and in brackets within the numbers of steps."""
    pooled, within = pooled_and_within(means, name, of)
    if pooled is None:
        return ""
    return f"{pooled:.2f}" + ("" if within is None else f" ({within:.2f})")
