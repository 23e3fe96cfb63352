"""This file tells the tables of `experiments/stability.py`, and draws its figures, from its CSV.

    python experiments/stability_tables.py experiments/records/stability_seed0.csv.gz
    python experiments/stability_tables.py runs/stability/stability.csv --figures FOLDER

The CSV holds all that the tables need, rounded to five digits; not the distance of each twin.
A row is one configuration after one number of steps: what each expert's twins and card tell, and
the gaps between test and training loss of experts, their average and the base. A gap counts beyond
the base's on the same images, which the frozen heads alone make. Squared distances are means over
the twins; an expert counts as measured where one replaced sample moves it ten times as far as
rounding does.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from correlations import pooled_and_within, spearman
from exponents import grouped
from finished import read_table
from inputs import command
from stability_exponents import exponents, plots

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.curves import sheet

Row: TypeAlias = Mapping[str, Any]
Point: TypeAlias = Mapping[str, float]

PREDICTORS = {
    "eps": "eps, one sample",
    "eps_path": "eps_path",
    "K eta": "K eta (null)",
    "displacement": "length of the way (null)",
    "train_accuracy": "training accuracy (null)",
}


def main() -> None:
    """Print the tables of every backbone, and draw their figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="+", type=Path, help="CSV of experiments/stability.py")
    parser.add_argument("--figures", type=Path, help="folder of the figures; none without it")
    given = parser.parse_args()
    experts = [row for path in given.tables for row in read(path)]
    for (backbone,), own in grouped(experts, "backbone").items():
        rows = nested(own)
        print(f"\n### {backbone}\n\n{told(rows)}", flush=True)
        if given.figures:
            draw(given.figures, backbone, rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table: one for each expert."""
    return read_table(path, "experiments/stability.py", (*_SHARED, *_OF_EXPERT, *_GAPS, "task"))


_SHARED = ("backbone", "lr", "batch", "train_share", "seed", "steps")
_OF_EXPERT = ("eps2_rounding", "n", "eps_path", "displacement", "train_accuracy")
_GAPS = ("gap_expert", "gap_merged", "gap_base")


def nested(experts: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows of configurations and steps from rows of experts: what `flat` undoes."""
    numbers = [name.removeprefix("measured_") for name in experts[0] if "measured_" in name]
    return [
        {
            **dict(zip(_SHARED, key, strict=True)),
            "batch": int(each[0]["batch"]),
            "steps": int(each[0]["steps"]),
            "experts": {e["task"]: _expert(e, numbers) for e in each},
            "gaps": {
                name.removeprefix("gap_"): {e["task"]: e[name] for e in each} for name in _GAPS
            },
        }
        for key, each in grouped(experts, *_SHARED).items()
    ]


def _expert(row: Row, numbers: Sequence[str]) -> dict[str, Any]:
    return {
        "eps2": {m: row[f"eps2_{m}"] for m in numbers},
        "above": {m: row[f"measured_{m}"] for m in numbers},
        "rounding": row["eps2_rounding"],
        **{name: None if math.isnan(row[name]) else row[name] for name in _OF_EXPERT[1:]},
    }


def told(rows: Sequence[Row]) -> str:
    """Return all tables of one backbone."""
    return "\n\n".join([distances(rows), exponents(rows), calibration(rows), ranks(rows)])


def draw(folder: Path, backbone: str, rows: Sequence[Row]) -> None:
    """Write the figure of one backbone."""
    place = folder / f"stability_{backbone.replace('/', '-')}.svg"
    write_text(place, sheet(f"Stability of {backbone} experts, by rate", plots(rows)))


def distances(rows: Sequence[Row]) -> str:
    """Return a table of eps by configuration and steps: medians over the tasks."""
    numbers = sorted(next(iter(rows[0]["experts"].values()))["eps2"], key=int)
    heads = [f"eps, m = {m}" for m in numbers]
    lines = [
        f"| configuration | K | {' | '.join(heads)} | rounding | measured | eps_path | "
        "eps over the way |",
        "|---" * (len(numbers) + 6) + "|",
    ]
    for row in rows:
        experts = list(row["experts"].values())
        eps = [_middle(e["eps2"][m] ** 0.5 for e in experts) for m in numbers]
        measured = sum(bool(e["above"][numbers[0]]) for e in experts)
        share = _middle(_eps(e) / (e["displacement"] or 1.0) for e in experts)
        cells = [
            _name(row),
            str(row["steps"]),
            *(f"{value:.3g}" for value in eps),
            f"{_middle(e['rounding'] ** 0.5 for e in experts):.2g}",
            f"{measured} of {len(experts)}",
            f"{_middle(e['eps_path'] or 0.0 for e in experts):.3g}",
            f"{share:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration(rows: Sequence[Row]) -> str:
    """Return by rate how far the path estimate, and m samples at once, are from one sample's eps.

    Each as a median ratio with quartiles over the measured experts: `eps_path / eps`, and the
    squared distance of the largest m over m to that of one, 1 if distances grow as theory says.
    """
    lines = [
        "| rate | measured | eps_path / eps | Spearman with eps: eps_path | "
        "length of the way (null) | K (null) | eps² of m at once / eps² of one |",
        "|---|---|---|---|---|---|---|",
    ]
    for lr in sorted({row["lr"] for row in rows}):
        everyone = [
            {**e, "steps": row["steps"]}
            for row in rows
            if row["lr"] == lr
            for e in row["experts"].values()
        ]
        known = [e for e in everyone if e["above"][_least(e)]]
        most = max(everyone[0]["eps2"], key=int)
        cells = [
            f"{lr:g}",
            f"{len(known)} of {len(everyone)}",
            _spread([e["eps_path"] / _eps(e) for e in known if e["eps_path"]]),
            *(_told(_ranks_eps(known, name)) for name in ("eps_path", "displacement", "steps")),
            _spread([e["eps2"][most] / e["eps2"][_least(e)] for e in known]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ranks_eps(experts: Sequence[Row], name: str) -> float | None:
    """Return Spearman's correlation of a number with eps, of the experts that know it."""
    known = [e for e in experts if e[name] is not None]
    return spearman([e[name] for e in known], [_eps(e) for e in known])


def ranks(rows: Sequence[Row]) -> str:
    """Return Spearman's rank correlations of predictors with the gaps of experts and merges.

    Pooled, and as the mean within one number of steps. Of a merge each predictor is the mean over
    its experts (of eps the root of the mean square, Delta up to the number of tasks), and it counts
    where all of them are measured.
    """
    alone, merges = list(_experts(rows)), list(_merges(rows))
    lines = [
        f"{len(alone)} experts and {len(merges)} merges are measured.\n",
        "| Spearman with the gap of | experts, pooled | within steps | merges, pooled | "
        "within steps |",
        "|---|---|---|---|---|",
    ]
    for name, about in PREDICTORS.items():
        found = [of for points in (alone, merges) for of in pooled_and_within(points, name, "gap")]
        cells = [_told(value) for value in found]
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _experts(rows: Sequence[Row]) -> Iterator[Point]:
    """Yield what each measured expert shows."""
    for row in rows:
        for task, expert in row["experts"].items():
            if expert["above"][_least(expert)]:
                yield {**_shown(row, [expert]), "gap": _added(row, "expert", [task])}


def _merges(rows: Sequence[Row]) -> Iterator[Point]:
    """Yield what each merge of measured experts shows."""
    for row in rows:
        experts = list(row["experts"].values())
        if all(expert["above"][_least(expert)] for expert in experts):
            yield {**_shown(row, experts), "gap": _added(row, "merged", row["experts"])}


def _shown(row: Row, experts: Sequence[Row]) -> dict[str, float]:
    def mean(name: str) -> float:
        return statistics.fmean(expert[name] or 0.0 for expert in experts)

    def root(squares: Iterator[float]) -> float:
        return statistics.fmean(squares) ** 0.5

    return {
        "steps": row["steps"],
        "eps": root(_eps(e) ** 2 for e in experts),
        "eps_path": root((e["eps_path"] or math.nan) ** 2 for e in experts),
        "K eta": row["steps"] * row["lr"],
        "displacement": mean("displacement"),
        "train_accuracy": mean("train_accuracy"),
    }


def _added(row: Row, what: str, tasks: Any) -> float:
    """Return the mean gap over tasks beyond the base's."""
    gaps = row["gaps"]
    return statistics.fmean(gaps[what][task] - gaps["base"][task] for task in tasks)


_NONE = "-"


def _told(correlation: float | None) -> str:
    return _NONE if correlation is None else f"{correlation:.2f}"


def _least(expert: Row) -> str:
    """Return the fewest replaced samples, as the rows' key."""
    return str(min(expert["eps2"], key=int))


def _eps(expert: Row) -> float:
    return float(expert["eps2"][_least(expert)]) ** 0.5


def _spread(values: Sequence[float]) -> str:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return _NONE
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _name(row: Row) -> str:
    share = "" if row["train_share"] == 1 else f", share {row['train_share']:g}"
    return f"rate {row['lr']:g}, batch {row['batch']}{share}"


_middle: Callable[[Iterator[float]], float] = statistics.median


if __name__ == "__main__":
    sys.exit(command(main))
