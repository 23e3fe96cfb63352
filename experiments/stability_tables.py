"""This file tells the tables of `experiments/stability.py`; it is a module, not a command.

A row is one configuration after one number of steps: what each expert's twins and card tell, and
the gaps between test and training loss of experts, their average and the base. A gap counts beyond
the base's on the same images, which the frozen heads alone make. Squared distances are means over
the twins; an expert counts as measured where one replaced sample moves it ten times as far as
rounding does.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from correlations import pooled_and_within, spearman

Row: TypeAlias = Mapping[str, Any]
Point: TypeAlias = Mapping[str, float]

PREDICTORS = {
    "eps": "eps, one sample",
    "eps_path": "eps_path",
    "K eta": "K eta (null)",
    "displacement": "length of the way (null)",
    "train_accuracy": "training accuracy (null)",
}


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
        "| rate | measured | eps_path / eps | Spearman of the two | "
        "eps² of m at once / eps² of one |",
        "|---|---|---|---|---|",
    ]
    for lr in sorted({row["lr"] for row in rows}):
        everyone = [e for row in rows if row["lr"] == lr for e in row["experts"].values()]
        known = [e for e in everyone if e["above"][_least(e)]]
        most = max(everyone[0]["eps2"], key=int)
        cells = [
            f"{lr:g}",
            f"{len(known)} of {len(everyone)}",
            _spread([e["eps_path"] / _eps(e) for e in known if e["eps_path"]]),
            _told(spearman([e["eps_path"] or 0.0 for e in known], [_eps(e) for e in known])),
            _spread([e["eps2"][most] / e["eps2"][_least(e)] for e in known]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        "eps_path": root((e["eps_path"] or 0.0) ** 2 for e in experts),
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
