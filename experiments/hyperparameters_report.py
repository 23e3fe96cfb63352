"""This file tells what the sweep over hyperparameters shows, beside what theory predicts.

    python experiments/hyperparameters_report.py runs/hyperparameters/*.csv --figures FOLDER

Prints for each schedule a table of exponents beside both predictions, where the merged loss is
least, and rank correlations; and draws a sheet of curves for each backbone. An exponent is the
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
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import CLOSED, PREDICTIONS, Predicted, Prediction, predicted, verdict
from exponents import QUANTITIES, Row, epochs, grouped, measured, predicted_of, varying
from finished import read_table
from hyperparameters_ranks import ranks
from inputs import command
from markdown import table

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.curves import Plot, sheet
from mergekit_lit.reports.intervals import student_half_width


def main() -> None:
    """Print the tables of every schedule and backbone, and draw their curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tables", nargs="+", type=Path, help="CSV of experiments/hyperparameters.py"
    )
    parser.add_argument("--figures", type=Path, help="folder of the figures; none without it")
    given = parser.parse_args()
    rows = [row for path in given.tables for row in read(path)]
    for (schedule,), found in grouped(rows, "schedule").items():
        print(f"\n### {schedule} rate\n\n{told(found)}", flush=True)
    if given.figures:
        for (schedule, backbone), found in grouped(rows, "schedule", "backbone").items():
            place = given.figures / f"hyperparameters_{backbone.replace('/', '-')}_{schedule}.svg"
            title = f"What hyperparameters do to the average of {backbone} experts"
            write_text(place, sheet(title, plots(found)))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of the sweep."""
    return read_table(path, "experiments/hyperparameters.py", _COLUMNS)


# Tables of other versions lack some that are ranked alone.
_COLUMNS = (
    *("backbone", "schedule", "seed", "lr", "batch", "train_share", "steps", "size", "group", "n"),
    *("travel", "displacement", "eps_path", "drift", "merged_noise", "generalization_path"),
    *("merged_gradient", "gap", "base_gap", "train_loss", "test_loss", "base_test_loss"),
    *("experts_train_loss", "experts_test_loss", "accuracy"),
)


def told(rows: Sequence[Row]) -> str:
    """Return the tables of one schedule."""
    by_backbone = {name: found for (name,), found in grouped(rows, "backbone").items()}
    parts = [exponents(by_backbone)]
    parts += [shapes(name, found) for name, found in by_backbone.items()]
    parts += [ranks(by_backbone)]
    return "\n\n".join(part for part in parts if part)


def exponents(by_backbone: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of measured exponents beside both predictions."""
    regimes = [f"{name}, {where}" for name in by_backbone for where in ("below an epoch", "beyond")]
    lines = []
    for factor, quantities in PREDICTIONS.items():
        varied = {name: varying(rows, factor) for name, rows in by_backbone.items()}
        for quantity, expected in quantities.items():
            cells = [
                _exponent(
                    [row for row in rows if (epochs(row) > 1.05) == bool(place)],
                    factor,
                    quantity,
                    expected,
                    place,
                )
                for rows in varied.values()
                for place in range(2)
            ]
            if any(cells):
                both = [_predicted(expected.source), _predicted(expected.ours)]
                lines.append([factor, quantity, *both, *cells])
    return table(["factor", "quantity", "source", "ours", *regimes], lines)


def _exponent(
    rows: Sequence[Row], factor: str, quantity: str, expected: Predicted, place: int
) -> str:
    """Return a slope with its interval and both verdicts; nothing where no factor varies."""
    found = measured(rows, factor, quantity)
    if found is None:
        return ""
    slope, bounds = found
    number = f"{slope:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")
    ours = predicted_of(expected.ours[place], rows, factor, quantity)
    said = [verdict(slope, bounds, each) for each in (expected.source[place], ours)]
    form = f": {ours:.2f}" if expected.ours[place] == CLOSED else ""
    return f"{number} ({'/'.join(word[:1] or '-' for word in said)}{form})" if any(said) else number


def shapes(backbone: str, rows: Sequence[Row]) -> str:
    """Return where merged test loss is least, by learning rate and by number of steps.

    Both predict a U over the number of steps, and we over the learning rate. Step 0 and rate 0 are
    the base: a curve that is least there says that merging does not help.
    """
    varied = varying(rows, "learning rate")
    head = [f"merged test loss, {backbone}", "over", "least at", "shape", "a U is predicted by", ""]
    lines = []
    for held, over, by in (("lr", "steps", "both"), ("steps", "lr", "ours")):
        for (value,), each in sorted(grouped(varied, held).items()):
            curves = [_curve(found, over) for found in grouped(each, "seed").values()]
            if len(curves[0]) < 4:
                continue
            levels = [level for level in sorted(curves[0]) if all(level in c for c in curves)]
            mean = {level: statistics.fmean(curve[level] for curve in curves) for level in levels}
            seen = ", ".join(f"{level:g}: {loss:.3f}" for level, loss in mean.items())
            least, form = shape(curves, levels)
            found_u = {"U": "agree", "rises": "disagree"}.get(form, "undecided")
            lines.append([f"{held} {value:g}", f"{over} ({seen})", f"{least:g}", form, by, found_u])
    return table(head, lines)


def _curve(rows: Sequence[Row], over: str) -> dict[float, float]:
    """Return the merged test loss of one seed, the base's at 0."""
    curve = {0.0: statistics.fmean(row["base_test_loss"] for row in rows)}
    for (level,), found in sorted(grouped(rows, over).items()):
        curve[level] = statistics.fmean(row["test_loss"] for row in found)
    return curve


def shape(curves: Sequence[Mapping[float, float]], levels: Sequence[float]) -> tuple[float, str]:
    """Return where curves are least on average, and `falls`, `rises`, `U` or `undecided`.

    What rises or falls to the ends of the grid must do so with Student's 95 % over the curves, one
    of each seed; one curve decides nothing.
    """
    least = min(levels, key=lambda level: statistics.fmean(curve[level] for curve in curves))
    ends = [end for end in (levels[0], levels[-1]) if end != least]
    for end in ends:
        rise = [curve[end] - curve[least] for curve in curves]
        if len(rise) < 2 or statistics.fmean(rise) <= student_half_width(rise):
            return least, "undecided"
    if len(ends) == 2:
        return least, "U"
    return least, "falls" if least == levels[-1] else "rises"


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
    known = [row for row in rows if not math.isnan(value(row))]
    curves = {
        f"{level:g}": [
            (steps, statistics.fmean(value(row) for row in at))
            for (steps,), at in sorted(grouped(each, "steps").items())
        ]
        for (level,), each in sorted(grouped(known, by).items())
    }
    return Plot(title, "steps K", curves, log=log)


def _predicted(of: tuple[Prediction, Prediction]) -> str:
    """Return what is predicted, below an epoch and beyond it where the two differ."""
    told = [predicted(prediction) for prediction in of]
    return told[0] if told[0] == told[1] else ", ".join(each or "none" for each in told)


if __name__ == "__main__":
    sys.exit(command(main))
