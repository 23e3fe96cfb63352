"""This file is the little drawing that the figures need: SVG elements, axes and lines as text."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


def element(tag: str, *children: str, **attributes: str | float | None) -> str:
    """Return one SVG element as text.

    Attribute names are written with `_` for `-`; a trailing `_` (as in `class_`) is dropped.
    Numbers are cut to two decimals, values escaped, and None left out. Children are markup.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{''.join(children)}</{tag}>" if children else f"<{tag}{written}/>"


def label(text: str, x: float, y: float, *, class_: str = "label", anchor: str = "start") -> str:
    """Return a line of text, escaped."""
    return element("text", html.escape(text), x=x, y=y, class_=class_, text_anchor=anchor)


def drawing(*children: str, width: float, height: float, title: str, description: str) -> str:
    """Return a whole SVG that scales with its box and tells its content to a screen reader."""
    return element(
        "svg",
        element("title", html.escape(title)),
        element("desc", html.escape(description)),
        *children,
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        role="img",
        aria_label=f"{title}. {description}",
    )


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to the pixels [start, end].

    Attributes:
        low: value that lands on `start`.
        high: value that lands on `end`.
        start: first pixel.
        end: last pixel; below `start` for an axis that points up.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Return at most `count` + 1 round numbers that lie inside the scale."""
        span = self.high - self.low
        if not (span > 0 and math.isfinite(span)):
            return [self.low]
        rough = span / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def line(points: Sequence[tuple[float, float]], *, class_: str) -> str:
    """Return a polyline through pixel positions."""
    path = " ".join(f"{_value(x)},{_value(y)}" for x, y in points)
    return element("polyline", points=path, class_=class_)


def number(value: float) -> str:
    """Return a tick's text: no trailing zeros, at most four significant digits."""
    return f"{value:.4g}"


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return html.escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
