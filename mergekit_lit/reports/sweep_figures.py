"""This file draws the figures of a sweep: an objective by the levels of a factor, and as a map."""

from collections.abc import Sequence
from html import escape

from mergekit_lit.reports.figures import grid, map_cell
from mergekit_lit.reports.svg import Scale, drawing, element, label, number
from mergekit_lit.reports.sweeps import Level

_WIDTH = 340.0
# Of a page: a map of few tasks is not blown up to it.
_WHOLE = 1100.0


def level_panel(factor: str, levels: Sequence[Level], *, ends: tuple[float, float]) -> str:
    """Draw one factor: a dot a level, the mean, and a bar from the 10th to the 90th percentile.

    Args:
        factor: name of the setting.
        levels: at least one.
        ends: of the axis, which all factors share so that their effects compare.
    """
    top, step = 34.0, 21.0
    bottom = top + step * len(levels)
    x = Scale(*ends, 140.0, 286.0)
    marks = [grid(x, x.ticks(3), top - 8, bottom)]
    for index, level in enumerate(levels):
        y = top + step * (index + 0.5)
        marks += [
            label(_short(level.label), x.start - 10, y + 4, anchor="end"),
            element("line", x1=x(level.low), x2=x(level.high), y1=y, y2=y, class_="whisker merged"),
            element("circle", cx=x(level.mean), cy=y, r=4.2, class_="dot merged"),
            label(number(level.mean), _WIDTH, y + 4, class_="value", anchor="end"),
        ]
    told = "; ".join(f"{level.label} {number(level.mean)} of {level.count}" for level in levels)
    return drawing(
        label(factor, 0, 14, class_="title"),
        *marks,
        width=_WIDTH,
        height=bottom + 20,
        title=f"By {factor}",
        description=told,
    )


def score_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> str:
    """Draw a number for each row and column, the deeper the larger within the map."""
    left, top, cell = 128.0, 96.0, 44.0
    known = [value for line in values for value in line if value is not None]
    low = min(known)
    span = max(known) - low or 1.0
    parts = []
    for j, name in enumerate(columns):
        across = left + cell * (j + 0.5)
        turned = f"rotate(-45 {across:.1f} {top - 8:.1f})"
        text = escape(_short(name))
        parts.append(element("text", text, x=across, y=top - 8, class_="label", transform=turned))
    for i, name in enumerate(rows):
        parts.append(label(_short(name), left - 8, top + cell * (i + 0.5) + 4, anchor="end"))
        for j, value in enumerate(values[i]):
            share = None if value is None else (value - low) / span
            parts.append(
                map_cell(value, share, (left + cell * j, top + cell * i), cell, shown=True)
            )
    return drawing(
        *parts,
        width=max(_WHOLE, left + cell * len(columns) + 60),
        height=top + cell * len(rows) + 4,
        title="Each method on each task",
        description=f"{len(rows)} methods, {len(columns)} tasks, "
        f"from {number(low)} to {number(max(known))}",
    )


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"
