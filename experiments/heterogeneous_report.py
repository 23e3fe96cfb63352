"""This file tells what becomes of merges whose experts were trained differently.

    python experiments/heterogeneous_report.py runs/heterogeneous/*.csv

Of each backbone: how many points of test accuracy each method's merge of mixed experts lies above
the mean of the two averages of the same tasks whose experts are of one kind, with Student's 95 %
over the seeds and the sum of its coefficients; and how well the divergences chi2_lambda and chi2_w,
and two numbers that need no theory, rank how far it falls below.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from correlations import spearman
from finished import read_table
from inputs import command
from markdown import table

from mergekit_lit.reports.intervals import mean_told

UNIFORM = "uniform"
"""The row of the averages of one kind."""


def main() -> None:
    """Print the tables of every backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="+", type=Path, help="CSV of experiments/heterogeneous.py")
    given = parser.parse_args()
    print(told([row for path in given.tables for row in read(path)]), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of mixes."""
    return read_table(path, "experiments/heterogeneous.py", _COLUMNS)


_COLUMNS = (
    *("backbone", "seed", "mix", "group", "swapped", "row", "accuracy", "sum"),
    *("chi2_lambda", "chi2_w", "travel", "ratio"),
)


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of all backbones."""
    parts = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        found = with_falls([row for row in rows if row["backbone"] == backbone])
        parts.append(f"\n### {backbone}\n\n{points(found)}\n\n{ranks(found)}")
    return "\n".join(parts)


def with_falls(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with how far each falls below the averages of one kind of the same tasks."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("backbone", "seed", "mix", "group", "swapped"))

    uniform_of = {key(row): row["accuracy"] for row in rows if row["row"] == UNIFORM}
    return [{**row, "fall": uniform_of[key(row)] - row["accuracy"]} for row in rows]


def points(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of points above the averages of one kind, by mix and row."""
    names = [name for name in dict.fromkeys(row["row"] for row in rows) if name != UNIFORM]
    lines = []
    for mix in dict.fromkeys(row["mix"] for row in rows):
        own = {n: [r for r in rows if (r["mix"], r["row"]) == (mix, n)] for n in (UNIFORM, *names)}
        cells = [mix, mean_told(by_seed(own[UNIFORM], "accuracy"))]
        average = own.get("average", [])
        cells += [f"{statistics.fmean(row['chi2_w'] for row in average):.3f}" if average else ""]
        for name in names:
            above = [-100 * fall for fall in by_seed(own[name], "fall")]
            sums = by_seed(own[name], "sum")
            cells.append(
                f"{mean_told(above, '+.1f')} ({statistics.fmean(sums):.1f})" if sums else ""
            )
        lines.append(cells)
    return table(["mix", "averages of one kind", "χ²_w of the average", *names], lines)


def by_seed(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the mean over groups of each seed."""
    return [
        statistics.fmean(row[name] for row in rows if row["seed"] == seed)
        for seed in dict.fromkeys(row["seed"] for row in rows)
    ]


def ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rank correlations of divergences and nulls with the fall of merges.

    Of the plain average alone, over mixed groups; and of all rows.
    """
    merges = [row for row in rows if row["row"] != UNIFORM]
    average = [row for row in merges if row["row"] == "average"]
    told = {
        "chi2_lambda": "χ²_λ",
        "chi2_w": "χ²_w",
        "travel": "mean travel (null)",
        "ratio": "longest over shortest τ (null)",
    }
    lines = [[about, _rank(average, name), _rank(merges, name)] for name, about in told.items()]
    return table(["Spearman with the fall", "average", "all rows"], lines)


def _rank(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    # A coefficient of 0 or below has no divergence.
    pairs = [(row[name], row["fall"]) for row in rows if not math.isnan(row[name])]
    found = spearman([value for value, _ in pairs], [fall for _, fall in pairs])
    return "constant" if found is None else f"{found:.2f} ({len(pairs)})"


if __name__ == "__main__":
    sys.exit(command(main))
