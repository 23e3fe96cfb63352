"""This file tells what the sweep over hyperparameters shows, beside what theory predicts.

    python experiments/hyperparameters_report.py runs/hyperparameters/*.csv --figures FOLDER

Prints three tables for each schedule and backbone, and draws a sheet of curves. An exponent is the
slope of log y over log x with the other factors at the centre, within each number of steps; of the
number of steps itself, over the effective steps ||a||_1 = travel / rate, which make up for momentum
and warm-up but for the first of them. What may be negative (`gap`, the merge's over the base's; the
merged gradient; losses over the experts') has a slope per factor e instead, of which only the sign
is compared. Intervals: Student's over seeds; of a single seed, the bootstrap over its groups, which
share tasks and one training each and therefore vary too little. eps_path, drift, merged noise and
generalization_path are formulas that hold the factors themselves, over measured noise,
displacements, losses and smoothness: their exponents say how these move, and are no measurement of
stability.
"""

import argparse
import csv
import gzip
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exponents import (
    PREDICTIONS,
    QUANTITIES,
    Prediction,
    Row,
    epochs,
    grouped,
    measured,
    usual_size,
    varying,
    verdict,
)

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.curves import Plot, sheet


def main() -> None:
    """Print the tables of every schedule and backbone, and draw their curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tables", nargs="+", type=Path, help="CSV of experiments/hyperparameters.py"
    )
    parser.add_argument("--figures", type=Path, help="folder of the figures; none without it")
    given = parser.parse_args()
    rows = [row for path in given.tables for row in read(path)]
    for (schedule, backbone), found in grouped(rows, "schedule", "backbone").items():
        print(f"\n### {backbone}, {schedule} rate\n\n{told(found)}", flush=True)
        if given.figures:
            place = given.figures / f"hyperparameters_{backbone.replace('/', '-')}_{schedule}.svg"
            title = f"What hyperparameters do to the average of {backbone} experts"
            write_text(place, sheet(title, plots(found)))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table, which gzip may have packed; numbers as numbers."""
    words = ("backbone", "schedule", "group")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8") as file:
        return [
            {k: v if k in words else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def told(rows: Sequence[Row]) -> str:
    """Return the tables of one schedule and backbone."""
    parts = [exponents(rows), shapes(rows), ranks(rows)]
    return "\n\n".join(part for part in parts if part)


def exponents(rows: Sequence[Row]) -> str:
    """Return a table of measured exponents beside both predictions."""
    lines = [
        "| factor | regime | quantity | measured | source | | ours | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for factor, quantities in PREDICTIONS.items():
        varied = varying(rows, factor)
        for place, regime in enumerate(("below one epoch", "beyond")):
            chosen = [row for row in varied if (epochs(row) > 1.05) == bool(place)]
            for quantity, predicted in quantities.items():
                found = measured(chosen, factor, quantity)
                if found is None:
                    continue
                slope, bounds = found
                cells = [factor, regime, quantity, _number(slope, bounds)]
                for prediction in (predicted.source[place], predicted.ours[place]):
                    cells += [_predicted(prediction), verdict(slope, bounds, prediction)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def shapes(rows: Sequence[Row]) -> str:
    """Return where merged test loss is least, by learning rate and by number of steps.

    Both predict a U over the number of steps, and we over the learning rate. Step 0 and rate 0 are
    the base: a curve that is least there says that merging does not help.
    """
    varied = varying(rows, "learning rate")
    lines = [
        "| merged test loss | over | least at | shape | a U is predicted by | |",
        "|---|---|---|---|---|---|",
    ]
    for held, over, by in (("lr", "steps", "both"), ("steps", "lr", "ours")):
        for (value,), each in sorted(grouped(varied, held).items()):
            curve = {0.0: statistics.fmean(row["base_test_loss"] for row in each)}
            for (level,), found in sorted(grouped(each, over).items()):
                curve[level] = statistics.fmean(row["test_loss"] for row in found)
            if len(curve) > 3:
                seen = ", ".join(f"{level:g}: {loss:.3f}" for level, loss in curve.items())
                least = min(curve, key=lambda level: curve[level])
                form = shape(curve)
                found_u = {"U": "agree", "rises": "disagree", "falls": "undecided"}[form]
                cells = [f"{held} {value:g}", f"{over} ({seen})", f"{least:g}", form, by, found_u]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def shape(curve: Mapping[float, float]) -> str:
    """Return `falls`, `rises` or `U` by where a curve is least: at its end, its start, between."""
    levels = sorted(curve)
    least = min(levels, key=lambda level: curve[level])
    return {levels[0]: "rises", levels[-1]: "falls"}.get(least, "U")


def ranks(rows: Sequence[Row]) -> str:
    """Return rank correlations of terms, and of what needs no theory, with loss and gap.

    Over configurations and step counts, each a mean over seeds and groups of the usual size; pooled
    and as the mean within one number of steps.
    """
    size = usual_size(rows)
    cells = grouped(
        [row for row in rows if row["size"] == size], "lr", "batch", "train_share", "steps"
    )
    means = [
        {name: _mean(each, name) for name in _RANKED}
        | {"added": statistics.fmean(row["gap"] - row["base_gap"] for row in each)}
        for each in cells.values()
    ]
    for mean in means:
        mean["K eta"] = mean["steps"] * mean["lr"]
    if len(means) < 3:
        return ""
    lines = [
        "| Spearman with | test loss, pooled | within steps | gap, pooled | within steps |",
        "|---|---|---|---|---|",
    ]
    for name, about in _PREDICTORS.items():
        found = [_spearman(means, name, of) for of in ("test_loss", "added")]
        told = [cell for pair in found for cell in pair]
        lines.append(f"| {about} | {' | '.join(told)} |")
    return "\n".join(lines)


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


def _spearman(means: Sequence[Mapping[str, float]], name: str, of: str) -> tuple[str, str]:
    """Return the correlation pooled, and its mean over the step counts that have three or more."""
    from scipy.stats import spearmanr

    def rank(each: Sequence[Mapping[str, float]]) -> float | None:
        known = [mean for mean in each if not math.isnan(mean[name])]
        x, y = [mean[name] for mean in known], [mean[of] for mean in known]
        if len(known) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
            return None
        return float(spearmanr(x, y).statistic)

    pooled = rank(means)
    by_steps = [rank(each) for each in grouped(means, "steps").values()]
    known = [value for value in by_steps if value is not None]
    within = f"{statistics.fmean(known):.2f}" if known else "-"
    return ("-" if pooled is None else f"{pooled:.2f}"), within


def plots(rows: Sequence[Row]) -> list[Plot]:
    """Return the curves of one schedule and backbone."""
    by_rate = varying(rows, "learning rate")
    found = [
        _plot("Merged test loss, by learning rate", by_rate, "lr", _of("test_loss")),
        _plot("Merged train loss, by learning rate", by_rate, "lr", _of("train_loss")),
        _plot("Merged test accuracy, by learning rate", by_rate, "lr", _of("accuracy")),
        _plot("Gap of the merge, by learning rate", by_rate, "lr", _of("gap")),
        _plot("eps_path, by learning rate", by_rate, "lr", _of("eps_path"), log=True),
    ]
    over_experts = QUANTITIES["test loss over experts"]
    for title, factor, name, value in (
        ("Merged test loss, by batch", "batch", "batch", _of("test_loss")),
        (
            "Merged test loss, by share of images",
            "training images",
            "train_share",
            _of("test_loss"),
        ),
        ("Test loss over the experts', by number of tasks", "tasks", "size", over_experts),
    ):
        varied = varying(rows, factor)
        if len({row[name] for row in varied}) > 1:
            found.append(_plot(title, varied, name, value))
    return found


def _of(name: str) -> Callable[[Row], float]:
    return lambda row: float(row[name])


def _plot(
    title: str, rows: Sequence[Row], by: str, value: Callable[[Row], float], *, log: bool = False
) -> Plot:
    curves = {
        f"{level:g}": [
            (steps, statistics.fmean(value(row) for row in at))
            for (steps,), at in sorted(grouped(each, "steps").items())
        ]
        for (level,), each in sorted(grouped(rows, by).items())
    }
    return Plot(title, "steps K", curves, log=log)


def _number(slope: float, bounds: tuple[float, float] | None) -> str:
    return f"{slope:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")


def _predicted(prediction: Prediction) -> str:
    if prediction is None:
        return ""
    if isinstance(prediction, tuple):
        return f"{prediction[0]:g} to {prediction[1]:g}"
    return prediction if isinstance(prediction, str) else f"{prediction:g}"


if __name__ == "__main__":
    main()
