"""This file tells whether to merge experts of different bases: a section of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports.markup import (
    Cell,
    block,
    definitions,
    flags,
    measured,
    paragraph,
    section,
    table,
)
from mergekit_lit.reports.whiskers import whiskers


def initialisations_section(record: Record) -> str:
    """Return the section of one record of the stage `predict` that compares bases."""
    told = record.metrics["initialisations"]
    found = told["verdict"]
    return section(
        "Whether to merge experts of different bases",
        flags(record.metrics["warnings"]),
        definitions(
            {
                "Verdict": found["choice"],
                "Advice": found["advice"],
                "Why": found["reason"],
                "Rule": f"{found['rule']}; else the experts are kept apart",
                "Rests on": found["basis"],
            }
        ),
        block(told["command"]) if told["command"] else "",
        accuracy_panel(told) if told["single"] is not None else "",
        _bases_table(told["bases"]),
        _apart_table(told["apart"]) if told["apart"] else "",
        _ways_table(told["ways"]),
        paragraph(_legend(told), class_="soft"),
    )


def accuracy_panel(told: Mapping[str, Any]) -> str:
    """Draw the validation accuracy of each way to merge beside what needs no merge."""
    rows = [(way["method"], way["accuracy"], "merged") for way in told["ways"]]
    rows.append(("one network", told["single_accuracy"], "expert"))
    rows.append(("kept apart", told["kept_apart"], "expert"))
    return whiskers(
        "validation accuracy, mean over tasks",
        rows,
        title="Validation accuracy of each way to merge, and without a merge",
    )


def _bases_table(bases: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [Cell(base["name"]), Cell(base["hash"][:12]), Cell(", ".join(base["experts"]))]
        for base in bases
    ]
    return table("The bases", ("base", "hash", "its experts"), rows)


def _apart_table(apart: Sequence[Mapping[str, Any]]) -> str:
    names = ("distance", "aligned", "travelled")
    rows = [
        [Cell(f"{row['left']} to {row['right']}"), *(measured(row[name]) for name in names)]
        for row in apart
    ]
    heads = ("bases", "distance", "aligned by weights", "experts travelled")
    return table("How far the bases lie apart", heads, rows)


def _ways_table(ways: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            Cell(way["method"]),
            measured(way["stretch"]),
            _most(way["expected_cost"]),
            *(_cell(way.get(name)) for name in ("loss_cost", "accuracy", "cost", "gain")),
        ]
        for way in ways
    ]
    heads = (
        "way",
        "stretch",
        "expected cost, nats, at most",
        "measured cost, nats",
        "accuracy",
        "accuracy lost",
        "beside the best single network",
    )
    return table("Each way to merge, mean over tasks, on validation images", heads, rows)


def _legend(told: Mapping[str, Any]) -> str:
    chance = told["chance"]
    nothing = f" Knowing nothing costs {chance:.3g} nats." if chance is not None else ""
    single = f" The best single network is {told['single']}." if told["single"] else ""
    return (
        "Stretch is how far the experts lie from the merge, over how far they lie from their own "
        "bases. The expected cost takes the loss to rise alike in all directions: by what training "
        "gained, times the squared stretch. It is no bound: curvature differs by direction."
        f"{nothing}{single} No test image was looked at."
    )


def _most(cost: Mapping[str, float] | None) -> Cell:
    return measured(None if cost is None else cost["high"])


def _cell(found: Mapping[str, float] | None) -> Cell:
    return measured(found["value"], (found["low"], found["high"])) if found else measured(None)
