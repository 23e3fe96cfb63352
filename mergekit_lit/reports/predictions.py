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
        *(paragraph(line, class_="soft") for line in notes(record)),
        paragraph(f"Unknown here: {', '.join(record.metrics['unknown'])}.", class_="soft")
        if record.metrics["unknown"]
        else "",
    )


def notes(record: Record) -> list[str]:
    """Return what to bear in mind: measured cases of other backbones, and what is unknown."""
    metrics = record.metrics
    return [*_of_other_backbones(metrics), *_of_unknown(metrics)]


def _of_other_backbones(metrics: Mapping[str, Any]) -> list[str]:
    # Records of before this was kept lie in folders of users.
    own = metrics.get("backbone")
    rows = [one["backbone"] for merge in metrics["merges"] for one in merge["nearest"]]
    others = [name for name in rows if name != own]
    if own is None or not others:
        return []
    return [
        f"These experts are of the backbone {own!r}: {len(others)} of the {len(rows)} nearest "
        f"measured cases are of another one ({', '.join(sorted(set(others)))})."
    ]


def _of_unknown(metrics: Mapping[str, Any]) -> list[str]:
    unknown, by_task = metrics["unknown"], metrics.get("unknown_of", {})
    if not unknown:
        return []
    tasks = metrics["merges"][0]["tasks"]
    whole = not by_task or set(by_task) == set(tasks)
    lacking = "all tasks" if whole else ", ".join(repr(task) for task in by_task)
    count = "1 feature is" if len(unknown) == 1 else f"{len(unknown)} features are"
    return [
        f"{count} unknown of {lacking}, which neither cards nor images tell, such as "
        f"{unknown[0]!r}: these are predicted without, with intervals at least as wide."
    ]


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
