"""This file prints what `predict` tells of experts of different bases."""

from collections.abc import Mapping
from typing import Any

from mergekit_lit.cli.output import print_table
from mergekit_lit.core.records import Record

_WAYS = {
    "method": "way",
    "stretch": "stretch",
    "expected_cost": "expected cost, nats",
    "loss_cost": "measured, nats",
    "accuracy": "mean accuracy",
    "gain": "beside the best single network",
}


def print_initialisations(record: Record) -> None:
    """Print how far the bases lie apart, each way to merge, and the verdict with its rule."""
    told = record.metrics["initialisations"]
    rows = [{**base, "hash": base["hash"][:12]} for base in told["bases"]]
    heads = {"name": "base", "hash": "hash", "at_hand": "at hand", "experts": "experts"}
    print_table(rows, heads)
    print_table(
        told["apart"],
        {
            "left": "from",
            "right": "to",
            "distance": "distance",
            "aligned": "aligned by weights",
            "travelled": "experts travelled",
        },
    )
    print_table([_way(way) for way in told["ways"]], _WAYS)
    for line in notes(told):
        print(line)
    for line in record.metrics["warnings"]:
        print(f"warning: {line}")


def notes(told: Mapping[str, Any]) -> list[str]:
    """Return what the numbers mean, the verdict, its rule, and the command that follows it."""
    found = told["verdict"]
    lines = []
    if told["chance"] is not None:
        lines.append(f"Knowing nothing costs {told['chance']:.3g} nats: more says no more.")
    if told["single"] is not None:
        lines.append(
            f"Without a merge: {told['single']}, with heads fitted again for other tasks, has "
            f"{_value(told['single_accuracy'])}; the experts kept apart have "
            f"{_value(told['kept_apart'])}."
        )
    lines.append(f"Verdict: {found['choice']}, by {found['basis']}: {found['reason']}.")
    lines.append(f"Advice: {found['advice']}.")
    lines.append(f"Rule: {found['rule']}; else the experts are kept apart.")
    return [*lines, told["command"]] if told["command"] else lines


def _way(way: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row of the table of ways."""
    expected = way["expected_cost"]
    row = {
        "method": way["method"],
        "stretch": way["stretch"],
        "expected_cost": f"[{expected['low']:.3g}, {expected['high']:.3g}]" if expected else None,
    }
    return row | {name: _value(way[name]) for name in _WAYS if name in way and name not in row}


def _value(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
