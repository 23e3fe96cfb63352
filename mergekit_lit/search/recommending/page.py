"""This file writes the page of a recommendation: what to do, why, and what it rests on."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports.figures import panels
from mergekit_lit.reports.markup import (
    Cell,
    block,
    definitions,
    document,
    flags,
    folded,
    measured,
    paragraph,
    section,
    table,
)
from mergekit_lit.reports.svg import Scale, drawing, element, label, line, number

_WIDTH = 340.0
_MOST = 30

MEANINGS: Mapping[str, str] = {
    "looked ahead": "F_S(x0) - c ln(1 + s / s0) + q noise + base gap + g generalization: the form "
    "of the bound's terms, each with a factor fitted to merges that were measured. That progress "
    "grows with the logarithm of travel is no theorem: it was seen on embedded8.",
    "measured": "The merge was made of trained experts and scored on validation images.",
    "bound": "The terms of our reconstruction of the excess-error bound in closed form, for the "
    "merge of the sampled tasks: noise, smoothness and heterogeneity are measured, the "
    "displacement is taken to grow with travel. Its size is no prediction of the loss.",
    "interval": "95 %: which images were drawn, and which tasks were tried. It knows nothing of "
    "the choice among candidates by the same images.",
}


def recommendation_page(record: Record) -> str:
    """Return the whole page."""
    metrics = record.metrics
    chosen, expected = metrics["recommended"], metrics["expected"]
    lead = (
        f"Train with {chosen['optimizer']} at {chosen['lr']:g}, batch {chosen['batch']}, "
        f"{chosen['steps']} steps, {chosen['share']:.0%} of the training images."
    )
    key = (
        f'<ul class="key"><li class="base"><b>{expected["base"]:.3f}</b><span>base<br>all '
        f'{expected["tasks"]} tasks</span></li><li class="merged"><b>{expected["accuracy"]:.3f}'
        f"</b><span>expected merge<br>[{expected['low']:.3f}, {expected['high']:.3f}]"
        "</span></li></ul>"
    )
    return document(
        "How to train experts that merge well",
        f"<header><h1>How to train experts that merge well</h1>"
        f"{paragraph(lead, class_='lead')}{key}</header>",
        flags(metrics["cautions"]),
        section("Measured", _curves(metrics)),
        section("Candidates", _candidates(metrics["candidates"])),
        section("Rejected", _rejected(metrics)),
        section("Cost", _costs(metrics)),
        section("What the words mean", definitions(MEANINGS)),
        folded("Constants of the loss", block(_text(metrics["constants"]))),
    )


def _curves(metrics: Mapping[str, Any]) -> str:
    """Draw the validation loss of merges by steps, a panel a way."""
    ways: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in metrics["points"]:
        ways.setdefault(_way(point), []).append(point)
    values = [point["val_loss"] for point in metrics["points"] if point["val_loss"] is not None]
    base = [score["val_loss"] for score in metrics["base"].values()]
    start = sum(base) / len(base)
    ends = (min([*values, start]), max([*values, start]))
    drawn = {}
    for way, points in ways.items():
        title = f"{way[0]} {way[1]:g}, batch {way[2]}, share {way[3]:g}"
        drawn[title] = _panel(title, sorted(points, key=lambda p: p["steps"]), start, ends)
    return panels(drawn)


def _panel(
    title: str, points: Sequence[Mapping[str, Any]], start: float, ends: tuple[float, float]
) -> str:
    curve = [(0.0, start), *((p["steps"], p["val_loss"]) for p in points if p["val_loss"])]
    x = Scale(0.0, max(step for step, _ in curve), 44.0, _WIDTH - 12)
    y = Scale(*ends, 130.0, 30.0)
    parts = [label(title, 0, 14, class_="title")]
    parts += [
        element("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid")
        + label(number(tick), x.start - 6, y(tick) + 4, class_="tick", anchor="end")
        for tick in y.ticks(3)
    ]
    parts.append(
        element("line", x1=x.start, x2=x.end, y1=y(start), y2=y(start), class_="guide base")
    )
    parts.append(line([(x(step), y(loss)) for step, loss in curve], class_="curve merged"))
    parts += [element("circle", cx=x(s), cy=y(v), r=3, class_="dot merged") for s, v in curve[1:]]
    parts += [label(number(t), x(t), 147, class_="tick", anchor="middle") for t in x.ticks(4)]
    return drawing(
        *parts,
        width=_WIDTH,
        height=153,
        title=f"Validation loss of merges, {title}",
        description="; ".join(f"{step:g} steps {loss:.3f}" for step, loss in curve),
    )


def _candidates(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        *("candidate", "val loss", "", "progress", "noise", "generalization", "travel"),
        *("bound: progress", "drift", "merged noise", "generalization", "total"),
    )
    body = []
    for row in rows[:_MOST]:
        bound = row["bound"]
        terms = [bound[name] for name in ("progress", "drift", "merged_noise", "generalization")]
        body.append(
            [
                Cell(
                    f"{row['optimizer']} {row['lr']:g}, b {row['batch']}, share {row['share']:g}, "
                    f"K {row['steps']}"
                ),
                measured(row["val_loss"]),
                Cell("measured" if row["measured"] else "looked ahead"),
                *(measured(row[name]) for name in ("progress", "noise", "generalization")),
                measured(row["travel"]),
                *(measured(value) for value in (*terms, bound["total"])),
            ]
        )
    more = len(rows) - len(body)
    note = f" {more} more are in the record." if more > 0 else ""
    return paragraph(f"The best first.{note}") + table("Outlook and bound", columns, body)


def _rejected(metrics: Mapping[str, Any]) -> str:
    rejected = metrics["rejected"]
    found = {
        "over budget": f"{rejected['over_budget']} of {rejected['of']} candidates, whose training "
        "or first round of validation does not fit",
        **{f"{name}, diverged": why for name, why in rejected["diverged"].items()},
    }
    for place, each in enumerate(metrics["rounds"], start=1):
        found |= {f"{name}, round {place}": why for name, why in each["dropped"].items()}
    return definitions(found)


def _costs(metrics: Mapping[str, Any]) -> str:
    budget, seconds = metrics["budget"], metrics["seconds"]
    unit, limit = budget["unit"], budget["limit"]
    rows = [
        [Cell(name), measured(budget[name], digits=1), Cell(f"{budget[name] / limit:.1%}")]
        for name in ("probes", "validation run", "training")
    ]
    took = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return table(f"Of {limit:g} {unit}", ("part", unit, "share"), rows) + paragraph(
        f"Seconds that the parts took: {took}.", class_="soft"
    )


def _way(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["optimizer"], row["lr"], row["batch"], row["share"]


def _text(constants: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in constants.items() if name not in ("base", "gram")}
    return "\n".join(f"{name}: {value}" for name, value in shown.items())
