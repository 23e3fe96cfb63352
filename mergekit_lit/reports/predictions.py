"""This file tells what merges are expected to reach: a section of the page with its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports.figures import panels
from mergekit_lit.reports.initialisations import initialisations_section
from mergekit_lit.reports.markup import Cell, flags, folded, measured, paragraph, section, table
from mergekit_lit.reports.whiskers import whiskers

_OUTCOMES = {"accuracy": "accuracy", "excess_error": "excess error, nats"}
_LEVELS = {
    "cards": "cards and weights alone",
    "data": "cards, weights, and training and validation images",
    "probe": "cards, weights, images, and the scores of the plain average",
}


def predictions_section(records: Sequence[Record]) -> str:
    """Return the section of all records of the stage `predict`."""
    return "".join(
        initialisations_section(record) if "initialisations" in record.metrics else _section(record)
        for record in records
        if record.stage == "predict"
    )


def _section(record: Record) -> str:
    merges, share = record.metrics["merges"], record.metrics["coverage"]
    drawn = {name: interval_panel(merges, name) for name in _OUTCOMES}
    unknown = record.metrics["unknown"]
    return section(
        "What merges are expected to reach",
        flags(record.metrics["warnings"]),
        paragraph(
            f"Learned from measured merges, with {_LEVELS[record.config['level']]}. A dot is a "
            f"merge, its bar holds the outcome in {share:.0%} of the cases: this wide the errors "
            "were on tasks that were held out. No test image was looked at."
        ),
        panels(drawn, wide=True),
        _means_table(merges),
        _terms_table(merges),
        folded("Each task", _tasks_table(merges)),
        _nearest_table(merges),
        paragraph(f"Unknown here, and left out of the fit: {', '.join(unknown)}.", class_="soft")
        if unknown
        else "",
    )


def interval_panel(merges: Sequence[Mapping[str, Any]], outcome: str) -> str:
    """Draw one outcome of each merge as a dot with its interval."""
    return whiskers(
        f"expected {_OUTCOMES[outcome]}, mean over tasks",
        [(merge["method"], merge[outcome], "merged") for merge in merges],
        title=f"Expected {_OUTCOMES[outcome]} of each merge",
    )


def _means_table(merges: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [Cell(merge["method"]), *(_cell(merge[name]) for name in _OUTCOMES)] for merge in merges
    ]
    return table("Expected, mean over tasks", ("merge", *_OUTCOMES.values()), rows)


def _terms_table(merges: Sequence[Mapping[str, Any]]) -> str:
    """Return the terms that any of the merges knows."""
    known = [
        name
        for name in merges[0]["terms"]
        if any(merge["terms"][name] is not None for merge in merges)
    ]
    rows = [
        [Cell(merge["method"]), *(measured(merge["terms"][name]) for name in known)]
        for merge in merges
    ]
    heads = ("merge", *(name.replace("_", " ") for name in known))
    return table("Why: terms of the bound and what drives them", heads, rows)


def _tasks_table(merges: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [Cell(task), *(_cell(merge["tasks"][task]["accuracy"]) for merge in merges)]
        for task in merges[0]["tasks"]
    ]
    heads = ("task", *(merge["method"] for merge in merges))
    return table("Expected accuracy of each task", heads, rows)


def _nearest_table(merges: Sequence[Mapping[str, Any]]) -> str:
    words = ("method", "config", "task", "tasks", "backbone", "expert")
    rows = [
        [
            Cell(merge["method"]),
            *(Cell(str(one[name]).replace("+", " ")) for name in words),
            measured(one["accuracy"]),
        ]
        for merge in merges
        for one in merge["nearest"]
    ]
    heads = ("merge", "nearest measured", "with", "task", "merged with", "backbone", "expert")
    return table("The measured merges that are most like each", (*heads, "its accuracy"), rows)


def _cell(found: Mapping[str, float]) -> Cell:
    return measured(found["value"], (found["low"], found["high"]))
