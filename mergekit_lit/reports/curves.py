"""This file draws curves over logarithmic steps, several plots to a sheet, as one SVG file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mergekit_lit.reports.svg import Scale, element, label, line, number

_WIDTH, _HEIGHT = 340.0, 236.0
# Told apart by colour-blind readers too, on white and on black (Okabe & Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a828b")
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5b6570}"
    ".title{font-weight:600;font-size:12px;fill:#1c2126}"
    ".grid{stroke:#d9dde1}.curve{fill:none;stroke-width:1.8}"
    "@media (prefers-color-scheme:dark)"
    "{text{fill:#9aa5b1}.title{fill:#e8ebee}.grid{stroke:#333b43}}"
)


@dataclass(frozen=True)
class Plot:
    """Curves over one quantity.

    Attributes:
        title: what is drawn.
        across: name of the horizontal axis, which is logarithmic.
        curves: points (x, y) by name, x > 0.
        log: whether the vertical axis is logarithmic too; values that are not positive are left
            out.
    """

    title: str
    across: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False


def sheet(title: str, plots: Sequence[Plot], *, columns: int = 2) -> str:
    """Return plots side by side as a whole SVG file.

    Args:
        title: read by screen readers.
        plots: at least one, each with at least one point.
        columns: plots in a row.
    """
    rows = -(-len(plots) // columns)
    size = (_WIDTH * min(columns, len(plots)), _HEIGHT * rows)
    placed = [
        element(
            "g",
            *_drawn(plot),
            transform=f"translate({_WIDTH * (index % columns):g} {_HEIGHT * (index // columns):g})",
        )
        for index, plot in enumerate(plots)
    ]
    return element(
        "svg",
        element("title", escape(title)),
        element("style", _STYLE),
        *placed,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {size[0]:g} {size[1]:g}",
        width=size[0],
        height=size[1],
        role="img",
    )


def _drawn(plot: Plot) -> list[str]:
    curves = {
        name: [(math.log10(x), _vertical(y, log=plot.log)) for x, y in points if _shown(y, plot)]
        for name, points in plot.curves.items()
    }
    points = [point for curve in curves.values() for point in curve]
    parts = [label(plot.title, 8, 16, class_="title")]
    if not points:
        return parts
    x = Scale(min(p for p, _ in points), max(p for p, _ in points), 48.0, _WIDTH - 16)
    y = Scale(*_padded([v for _, v in points]), _HEIGHT - 58, 30.0)
    parts += _frame(plot, x, y)
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        drawn = [(x(p), y(v)) for p, v in sorted(curve)]
        parts.append(element("g", line(drawn, class_="curve"), stroke=colour))
        parts += [element("circle", cx=a, cy=b, r=2.6, fill=colour) for a, b in drawn]
        across = 48.0 + index * (_WIDTH - 60) / len(curves)
        parts.append(element("circle", cx=across, cy=_HEIGHT - 14, r=4.0, fill=colour))
        parts.append(label(name, across + 8, _HEIGHT - 10))
    return parts


def _frame(plot: Plot, x: Scale, y: Scale) -> list[str]:
    """Return the grid, its numbers and the name of the horizontal axis."""
    values = sorted({p for points in plot.curves.values() for p, _ in points})
    parts = []
    for tick in y.ticks(4):
        value = 10**tick if plot.log else tick
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(label(f"{value:.3g}", x.start - 6, y(tick) + 4, anchor="end"))
    parts += [label(number(v), x(math.log10(v)), y.start + 15, anchor="middle") for v in values]
    parts.append(label(plot.across, x.end, y.start + 30, anchor="end"))
    return parts


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _shown(value: float, plot: Plot) -> bool:
    return math.isfinite(value) and (value > 0 or not plot.log)


def _vertical(value: float, *, log: bool) -> float:
    return math.log10(value) if log else value
