"""This file is the tables of `experiments/initialisations.py`. It is a module, not a command."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from mergekit_lit.search.predicting.verdict import MOST_STRETCH, WAYS

Row: TypeAlias = Mapping[str, Any]

STRETCHES = (0.0, 0.5, 0.71, 0.87, 1.0, 1.2, 1.5, 2.0, 3.0, math.inf)
"""Thresholds that the rule on weights is tried with."""


def tables(rows: Sequence[Row]) -> str:
    """Return all tables, in Markdown."""
    return "\n\n".join((accuracies(rows), costs(rows), regrets(rows), thresholds(rows)))


def kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows by what they merge: their bases, and how many experts."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = f"home and {row['base']}" if row["across"] else f"{row['base']} alone"
        found.setdefault(f"{name}, {len(row['members'])}", []).append(row)
    return found


def told(rows: Sequence[Row], value: Callable[[Row], float], form: str = ".3f") -> str:
    """Return the mean over cases, of the seeds' means, and the range of these."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    means = [statistics.fmean(value(r) for r in rows if r["seed"] == seed) for seed in seeds]
    ends = f" ({min(means):{form}} to {max(means):{form}})" if len(means) > 1 else ""
    return f"{statistics.fmean(means):{form}}{ends}"


def accuracies(rows: Sequence[Row]) -> str:
    """Return the test accuracies of every way to merge, and without a merge."""
    heads = ("bases, experts", "cases", *WAYS, "one network", "kept apart", "ensemble of two bases")
    lines = []
    for name, of in kinds(rows).items():
        cells = [told(of, lambda r, m=m: r["options"][m]) for m in (*WAYS, "single")]
        cells.append(told(of, lambda r: r["kept_apart"]))
        known = [row for row in of if row["ensemble"] is not None]
        cells.append(told(known, lambda r: r["ensemble"]) if known else "")
        lines.append((name, str(len(of)), *cells))
    return _markdown(heads, lines)


def costs(rows: Sequence[Row]) -> str:
    """Return stretch, expected and measured cost, and how well either was predicted."""
    heads = ("bases, experts", "way", "stretch", "expected cost, nats, at most", "measured, nats")
    heads += ("below the expected", "accuracy lost: predicted", "measured", "in the 90 % interval")
    lines = []
    for name, of in kinds(rows).items():
        for way in WAYS:
            cells = [{"of": r["ways"][way], "seed": r["seed"]} for r in of]
            expected = [c for c in cells if c["of"]["expected_cost"]]
            below = [
                c["of"]["measured"]["loss_cost"] <= c["of"]["expected_cost"]["high"]
                for c in expected
            ]
            inside = [
                c["of"]["predicted"]["cost"]["low"]
                <= c["of"]["measured"]["cost"]
                <= c["of"]["predicted"]["cost"]["high"]
                for c in cells
            ]
            lines.append(
                (
                    name,
                    way,
                    told(cells, lambda c: c["of"]["stretch"], ".2f") if expected else "",
                    told(expected, lambda c: c["of"]["expected_cost"]["high"], ".2f")
                    if expected
                    else "",
                    told(cells, lambda c: c["of"]["measured"]["loss_cost"], ".2f"),
                    f"{sum(below)} of {len(below)}" if below else "",
                    told(cells, lambda c: c["of"]["predicted"]["cost"]["value"]),
                    told(cells, lambda c: c["of"]["measured"]["cost"]),
                    f"{sum(inside)} of {len(inside)}",
                )
            )
    return _markdown(heads, lines)


def regrets(rows: Sequence[Row]) -> str:
    """Return the regret in points of the verdicts, and of rules that always do the same."""
    rules: dict[str, Callable[[Row], str]] = {
        "by images: better than one network for sure": partial(by_gain, end="low"),
        "probably better": partial(by_gain, end="value"),
        "not worse for sure": partial(by_gain, end="high"),
        "by weights": partial(by_stretch, most=MOST_STRETCH),
        **{f"always {way}": lambda _, way=way: way for way in WAYS},
        "never merge": lambda _: "single",
    }
    heads = ("bases, experts", *rules)
    lines = [
        (name, *(told(of, lambda r, k=rule: regret(r, k(r)), ".1f") for rule in rules.values()))
        for name, of in kinds(rows).items()
    ]
    return _markdown(heads, lines)


def thresholds(rows: Sequence[Row]) -> str:
    """Return the regret of the rule on weights under other thresholds, within and across bases."""
    heads = ("largest stretch", "within a base", "near bases", "independent bases", "all")
    parts = [
        [row for row in rows if not row["across"]],
        [row for row in rows if row["across"] and row["base"] != "away"],
        [row for row in rows if row["across"] and row["base"] == "away"],
        list(rows),
    ]
    lines = [
        (f"{most:g}", *(_mean(regret(r, by_stretch(r, most=most)) for r in part) for part in parts))
        for most in STRETCHES
    ]
    return _markdown(heads, lines)


def by_gain(row: Row, *, end: str) -> str:
    """Return the best way on validation images, if its gain, or an end of it, is above 0."""
    gains = {way: row["ways"][way]["predicted"]["gain"] for way in WAYS}
    best = max(WAYS, key=lambda way: float(gains[way]["value"]))
    return best if gains[best][end] > 0 else "single"


def by_stretch(row: Row, *, most: float) -> str:
    """Return what the rule on weights takes under a threshold."""
    for way in WAYS:
        stretch = row["ways"][way]["stretch"]
        if stretch is not None and stretch <= most:
            return way
    return "single"


def regret(row: Row, chosen: str) -> float:
    """Return the accuracy that a choice forgoes at the size of one network, in points."""
    options: Mapping[str, float] = row["options"]
    return 100 * (max(options.values()) - options[chosen])


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.fmean(found):.1f}" if found else ""


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
