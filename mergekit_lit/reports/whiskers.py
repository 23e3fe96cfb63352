"""This file draws values with their intervals, one below the other."""

from collections.abc import Mapping, Sequence

from mergekit_lit.reports.figures import grid
from mergekit_lit.reports.svg import Scale, drawing, element, label

_WIDTH = 500.0
_TOP, _STEP = 34.0, 24.0


def whiskers(
    heading: str, rows: Sequence[tuple[str, Mapping[str, float], str]], *, title: str
) -> str:
    """Draw a dot with a bar for each row.

    Args:
        heading: above the figure.
        rows: name, `value` with `low` and `high`, and the style's class: `merged`, `expert`.
        title: for readers who do not see it, with all values.
    """
    bottom = _TOP + _STEP * len(rows)
    low, high = min(one["low"] for _, one, _ in rows), max(one["high"] for _, one, _ in rows)
    margin = 0.05 * (high - low) or 0.05
    x = Scale(low - margin, high + margin, 150.0, 420.0)
    marks = [
        label(heading, 0, 14, class_="title"),
        grid(x, x.ticks(4), _TOP - 8, bottom),
    ]
    for place, (name, one, kind) in enumerate(rows):
        y = _TOP + _STEP * (place + 0.5)
        ends = {"x1": x(one["low"]), "x2": x(one["high"]), "y1": y, "y2": y}
        marks.append(label(name, 142.0, y + 4, anchor="end"))
        marks.append(element("line", **ends, class_=f"whisker {kind}"))
        marks.append(element("circle", cx=x(one["value"]), cy=y, r=4.2, class_=f"dot {kind}"))
        marks.append(label(f"{one['value']:.3f}", 428.0, y + 4, class_="value"))
    told = (
        f"{name} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for name, one, _ in rows
    )
    return drawing(
        *marks,
        width=_WIDTH,
        height=bottom + 20,
        title=title,
        description="; ".join(told),
    )
