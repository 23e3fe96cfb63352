"""This file tells what bounds merges: a section of the page with its table and its figures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports.figures import panels, thinned
from mergekit_lit.reports.markup import Cell, flags, folded, paragraph, section, table
from mergekit_lit.reports.runs import Series
from mergekit_lit.reports.svg import Scale, drawing, element, label, line, number

_WIDTH = 500.0
_ALONG = "bound/"
_WORDS = {"delta2_by_path": "Delta\u00b2 (path)", "a_eff": "A_eff"}
_EXPERT = (
    "coefficient",
    "w",
    "travel",
    "d2",
    "noise",
    "eps_path",
    "expert_train_loss",
    "base_loss",
    "train_loss",
    "test_loss",
    "gap",
    "zeta2",
    "zeta2_merged",
)
# One colour a place in a stack or among curves; page.css has so many.
_PLACES = 7


def bounds_section(records: Sequence[Record], curves: Mapping[str, Mapping[str, Series]]) -> str:
    """Return the section of all records of the stage `bound`, and of terms along training."""
    found = [record for record in records if record.stage == "bound"]
    drawn = {"terms": stacked_panel(found), "losses": losses_panel(found)} if found else {}
    along = {task: along_panel(task, terms) for task, terms in _along(curves).items()}
    said = [
        f"{record.name}: {sentence}"
        for record in found
        for sentence in (*record.metrics["bound"]["violated"], *record.metrics["signatures"])
    ]
    return section(
        "What bounds the excess error",
        flags(said),
        _terms_table(found) if found else "",
        panels({name: text for name, text in drawn.items() if text}, wide=True) if drawn else "",
        folded("Every expert in every merge", *map(_experts_table, found)) if found else "",
        paragraph(
            "Along training: what each expert would add to the bound if it stopped there. "
            "The axis is logarithmic.",
            class_="soft",
        )
        if along
        else "",
        panels(along) if along else "",
    )


def stacked_panel(records: Sequence[Record]) -> str:
    """Draw for each merge its terms as one bar, end to end; those below 0 to the left of it.

    Terms without a number have no part in the bar, and are named behind it.
    """
    parts = list(records[0].metrics["bound"]["parts"])
    rows = {f"{i} {record.name}": _values(record) for i, record in enumerate(records)}
    ends = [
        math.fsum(v for v in row.values() if v is not None and (v > 0) == up)
        for row in rows.values()
        for up in (True, False)
    ]
    top, step = 52.0, 26.0
    bottom = top + step * len(rows)
    x = Scale(min(0.0, *ends), max(*ends, 1e-12), 140.0, 400.0)
    marks = [label("terms of the bound, nats", 0, 14, class_="title"), *_legend(parts, 32.0)]
    for tick in x.ticks(4):
        marks.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        marks.append(label(number(tick), x(tick), bottom + 14, class_="tick", anchor="middle"))
    for index, (record, row) in enumerate(zip(records, rows.values(), strict=True)):
        middle = top + step * (index + 0.5)
        marks.append(label(record.name, 132.0, middle + 4, anchor="end"))
        marks += _bar(list(row.values()), x, middle)
        marks.append(label(_told(record, row), 408.0, middle + 4, class_="value"))
    return drawing(
        *marks,
        width=_WIDTH,
        height=bottom + 20,
        title="Terms of the bound of each merge",
        description="; ".join(f"{r.name}: {_told(r, _values(r))}" for r in records),
    )


def losses_panel(records: Sequence[Record]) -> str:
    """Draw for each merge its training and test loss, means over tasks, and the gap between them.

    Guides mark the base's and the experts' own training losses. Empty where nobody measured them.
    """
    rows = [(record.name, _means(record.metrics["experts"])) for record in records]
    rows = [(name, means) for name, means in rows if "gap" in means]
    if not rows:
        return ""
    names = ("train_loss", "test_loss", "base_loss", "expert_train_loss")
    values = [means[name] for _, means in rows for name in names if name in means]
    top, step = 52.0, 26.0
    bottom = top + step * len(rows)
    margin = 0.05 * (max(values) - min(values)) or 0.05
    x = Scale(min(values) - margin, max(values) + margin, 140.0, 400.0)
    marks = [label("loss of the merge, nats: training to test", 0, 14, class_="title")]
    marks.append(label("dashed: base, experts (training); number: gap", 0, 32, class_="tick"))
    for tick in x.ticks(4):
        marks.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        marks.append(label(number(tick), x(tick), bottom + 14, class_="tick", anchor="middle"))
    for role, name in (("base", "base_loss"), ("expert", "expert_train_loss")):
        if name in rows[0][1]:
            at = x(rows[0][1][name])
            marks.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_=f"guide {role}"))
    for index, (name, means) in enumerate(rows):
        y = top + step * (index + 0.5)
        train, test = x(means["train_loss"]), x(means["test_loss"])
        marks.append(label(name, 132.0, y + 4, anchor="end"))
        marks.append(element("line", x1=train, x2=test, y1=y, y2=y, class_="whisker merged"))
        marks.append(element("circle", cx=train, cy=y, r=4.2, class_="dot merged"))
        marks.append(element("circle", cx=test, cy=y, r=4.2, class_="dot adapted"))
        marks.append(label(f"{means['gap']:+.3g}", 408.0, y + 4, class_="value"))
    return drawing(
        *marks,
        width=_WIDTH,
        height=bottom + 20,
        title="Training and test loss of each merge",
        description="; ".join(
            f"{name}: training {m['train_loss']:.3g}, test {m['test_loss']:.3g}" for name, m in rows
        ),
    )


def along_panel(task: str, terms: Mapping[str, Series]) -> str:
    """Draw one expert's terms by step, on a logarithmic axis, where they are positive."""
    curves = {
        name: [(step, math.log10(value)) for step, value in thinned(series) if value > 0]
        for name, series in terms.items()
    }
    points = [point for curve in curves.values() for point in curve]
    x = Scale(min(p for p, _ in points), max(p for p, _ in points), 48.0, 332.0)
    y = Scale(min(v for _, v in points), max(v for _, v in points), 170.0, 52.0)
    marks = [label(task, 0, 14, class_="title"), *_legend(list(curves), 32.0, width=340.0)]
    for tick in y.ticks(3):
        marks.append(element("line", x1=48.0, x2=332.0, y1=y(tick), y2=y(tick), class_="grid"))
        marks.append(label(f"{10**tick:.1e}", 44.0, y(tick) + 4, class_="tick", anchor="end"))
    marks += [label(number(t), x(t), 186.0, class_="tick", anchor="middle") for t in x.ticks(4)]
    for place, curve in enumerate(curves.values()):
        drawn = [(x(p), y(v)) for p, v in curve]
        marks.append(line(drawn, class_=f"curve term{place % _PLACES}"))
    ends = "; ".join(f"{name} {series[-1][1]:.3g}" for name, series in terms.items())
    return drawing(
        *marks,
        width=340.0,
        height=190.0,
        title=f"Terms of the bound along the training of {task}",
        description=f"At the last step: {ends}",
    )


def _along(curves: Mapping[str, Mapping[str, Series]]) -> dict[str, dict[str, Series]]:
    """Return the terms that `BoundTerms` logged, by task; none where it was not there."""
    found = {
        task: {
            _WORDS.get(name.removeprefix(_ALONG), name.removeprefix(_ALONG)): values
            for name, values in series.items()
            if name.startswith(_ALONG) and any(value > 0 for _, value in values)
        }
        for task, series in curves.items()
    }
    return {task: terms for task, terms in found.items() if terms}


def _values(record: Record) -> dict[str, float | None]:
    told = record.metrics["bound"]
    return {name: told["terms"][name]["value"] for name in told["parts"]}


def _told(record: Record, row: Mapping[str, float | None]) -> str:
    told = record.metrics["bound"]
    if told["total"] is not None:
        return f"{told['total']:.3g}"
    missing = {name: told["terms"][name]["note"] for name, value in row.items() if value is None}
    why = set(missing.values())
    one = len(missing) > 1 and len(why) == 1
    return "no total: " + (why.pop() if one else ", ".join(missing))


def _bar(values: Sequence[float | None], x: Scale, middle: float) -> list[str]:
    """Return the parts of one bar, each where those of its sign before it end."""
    ends, parts = {True: 0.0, False: 0.0}, []
    for place, value in enumerate(values):
        if value:
            start, end = sorted((x(ends[value > 0]), x(ends[value > 0] + value)))
            ends[value > 0] += value
            parts.append(
                element(
                    "rect",
                    x=start,
                    y=middle - 8,
                    width=end - start,
                    height=16.0,
                    class_=f"term{place % _PLACES}",
                )
            )
    return parts


def _legend(names: Sequence[str], y: float, *, width: float = _WIDTH) -> list[str]:
    """Return one dot and name for each place, side by side."""
    room = width / max(len(names), 1)
    return [
        mark
        for place, name in enumerate(names)
        for mark in (
            element(
                "circle", cx=5 + place * room, cy=y - 4, r=4.0, class_=f"term{place % _PLACES}"
            ),
            label(name.replace("_", " "), 12 + place * room, y, class_="tick"),
        )
    ]


def _terms_table(records: Sequence[Record]) -> str:
    first = records[0].metrics["bound"]
    names = [*first["parts"], *sorted(set(first["terms"]) - set(first["parts"]))]
    rows = []
    for record in records:
        told = record.metrics["bound"]
        terms = [told["terms"][name] for name in names]
        weights = [told["weighing"][name] for name in ("chi2_lambda", "chi2_w")]
        cells = [_cell(term["value"], term["provenance"]) for term in terms]
        rows.append(
            [
                Cell(record.name),
                # Older records know no second total.
                *(_cell(told.get(name), "unknown") for name in ("total", "total_by_step")),
                *cells,
                *(_cell(weight, "unknown") for weight in weights),
            ]
        )
    heads = ("merge", "total", "total by step", *(name.replace("_", " ") for name in names))
    return table("Terms of the bound", (*heads, "chi2_lambda", "chi2_w"), rows)


def _experts_table(record: Record) -> str:
    experts = record.metrics["experts"]
    names = [key for key in _EXPERT if any(row.get(key) is not None for row in experts)]
    rows = [
        [Cell(str(row["task"])), *(_cell(row[name], "unknown") for name in names)]
        for row in experts
    ]
    return table(record.name, ["task", *(name.replace("_", " ") for name in names)], rows)


def _cell(value: float | None, otherwise: str) -> Cell:
    return Cell(otherwise) if value is None else Cell(f"{value:.3g}", value)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over tasks of each number that every row knows."""
    known = [
        name for name in rows[0] if all(isinstance(row.get(name), (int, float)) for row in rows)
    ]
    return {name: statistics.fmean(row[name] for row in rows) for name in known}
