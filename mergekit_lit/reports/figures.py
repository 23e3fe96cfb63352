"""This file draws the figures of a report as SVG text: small panels that read at any width."""

from collections.abc import Mapping, Sequence
from html import escape

from mergekit_lit.reports.runs import Series
from mergekit_lit.reports.svg import Scale, drawing, element, label, line, number
from mergekit_lit.reports.tables import Score

_WIDTH = 340.0
_MAX_POINTS = 240


def accuracy_panel(title: str, rows: Sequence[Score], *, near: bool = False) -> str:
    """Draw one task: a dot a model, its 95 % interval, and its number.

    A thin line marks the base and another the experts, so that each merge is seen between them.
    The axis is [0, 1], so that tasks compare; `near` cuts it to what the rows need.
    """
    top, step, left, right = 34.0, 21.0, 140.0, 290.0
    bottom = top + step * len(rows)
    reached = [bound for row in rows for bound in (row.interval or (row.accuracy, row.accuracy))]
    x = Scale(*(_padded(reached) if near else (0.0, 1.0)), left, right)
    marks = [grid(x, x.ticks(4), top - 8, bottom)]
    marks += [
        element(
            "line",
            x1=x(r.accuracy),
            x2=x(r.accuracy),
            y1=top - 8,
            y2=bottom,
            class_=f"guide {r.role}",
        )
        for r in rows
        if r.role in ("base", "expert")
    ]
    for index, row in enumerate(rows):
        marks.append(_dot(row, x, top + step * (index + 0.5)))
    told = "; ".join(f"{row.model} {row.accuracy:.3f}" for row in rows)
    return drawing(
        label(title, 0, 14, class_="title"),
        *marks,
        width=_WIDTH,
        height=bottom + 20,
        title=f"Accuracy, {title}",
        description=told,
    )


def training_panel(task: str, loss: Series, gradient: Series) -> str:
    """Draw one expert's training: the loss above, the norm of its gradient below, by step."""
    steps = [step for series in (loss, gradient) for step, _ in series]
    x = Scale(min(steps), max(steps), 40.0, _WIDTH - 8)
    parts = [label(task, 0, 14, class_="title")]
    parts += _curve(loss, x, top=42.0, bottom=112.0, name="training loss, nats", class_="loss")
    parts += _curve(gradient, x, top=142.0, bottom=212.0, name="gradient norm", class_="gradient")
    parts += _below(x, 227)
    parts.append(label("step", _WIDTH - 8, 239, class_="tick", anchor="end"))
    last = f"loss {loss[-1][1]:.3f}" if loss else "loss not logged"
    norm = f"gradient norm {gradient[-1][1]:.3f}" if gradient else "gradient norm not logged"
    return drawing(
        *parts,
        width=_WIDTH,
        height=243,
        title=f"Training of {task}",
        description=f"At step {max(steps)}: {last}, {norm}.",
    )


def coefficient_panel(title: str, curve: Sequence[tuple[float, float]], chosen: float) -> str:
    """Draw the score on val by lambda, the choice marked; a dashed line is lambda 0, the base."""
    values = [value for _, value in curve]
    x = Scale(min(scale for scale, _ in curve), max(scale for scale, _ in curve), 40.0, _WIDTH - 12)
    y = Scale(*_padded(values), 138.0, 30.0)
    base = dict(curve).get(0.0)
    parts = [label(title, 0, 14, class_="title"), *_rows(y, x.start, x.end)]
    if base is not None:
        parts.append(
            element("line", x1=x.start, x2=x.end, y1=y(base), y2=y(base), class_="guide base")
        )
    parts.append(line([(x(scale), y(value)) for scale, value in curve], class_="curve merged"))
    for scale, value in curve:
        picked = scale == chosen
        name = "dot merged" if picked else "dot minor merged"
        parts.append(
            element("circle", cx=x(scale), cy=y(value), r=5 if picked else 2.4, class_=name)
        )
    parts += _below(x, 154)
    best = dict(curve)[chosen]
    parts.append(
        label(f"λ = {number(chosen)}: {best:.3f}", x.end, 14, class_="value", anchor="end")
    )
    return drawing(
        *parts,
        width=_WIDTH,
        height=160,
        title=f"Validation score of {title} by coefficient",
        description="; ".join(f"{number(scale)}: {value:.3f}" for scale, value in curve),
    )


def cosine_figure(names: Sequence[str], cosine: Sequence[Sequence[float | None]]) -> str:
    """Draw the cosines between the experts' deltas as a map; the diagonal is 1 and left blank."""
    return _pair_map(names, cosine, title="Cosine between the deltas of each two experts")


def conflict_figure(names: Sequence[str], conflict: Sequence[Sequence[float | None]]) -> str:
    """Draw the sign conflicts of the experts' deltas as a map, coloured by how far from 1/2.

    Below 1/2 (the colour of positive cosines) two experts agree more often than chance has it.
    """
    agreement = [[None if x is None else 0.5 - x for x in row] for row in conflict]
    title = "Sign conflict between the deltas of each two experts"
    return _pair_map(names, conflict, title=title, colours=agreement)


def thinned(series: Series) -> list[tuple[float, float]]:
    """Return at most 240 points: the mean of each of as many equal stretches of the series."""
    width = -(-len(series) // _MAX_POINTS) or 1
    parts = [series[start : start + width] for start in range(0, len(series), width)]
    return [
        (sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part))
        for part in parts
    ]


def smoothed(points: Sequence[tuple[float, float]], *, window: int) -> list[tuple[float, float]]:
    """Return the centred moving mean over `window` points, over fewer at the ends."""
    half = window // 2
    found = []
    for index, (position, _) in enumerate(points):
        near = [value for _, value in points[max(0, index - half) : index + half + 1]]
        found.append((position, sum(near) / len(near)))
    return found


def panels(drawings: Mapping[str, str], *, wide: bool = False) -> str:
    """Return drawings side by side, as many a line as the page is wide."""
    inner = "".join(f"<div>{text}</div>" for text in drawings.values())
    return f'<div class="panels{" wide" if wide else ""}">{inner}</div>'


def _pair_map(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    colours: Sequence[Sequence[float | None]] | None = None,
) -> str:
    """Draw one number for each two experts; the diagonal is left blank.

    Colour says the sign of `colours` (the values themselves by default), depth the size, relative
    to the largest off the diagonal; up to 12 experts the numbers stand in the cells.
    """
    count = len(names)
    left, top, cell = 112.0, 84.0, min(44.0, 440.0 / max(count, 1))
    shade = values if colours is None else colours
    pairs = [(i, j) for i in range(count) for j in range(i)]
    limit = max((abs(shade[i][j] or 0.0) for i, j in pairs), default=0.0) or 1.0
    parts = []
    for i, name in enumerate(names):
        across, down = left + cell * (i + 0.5), top + cell * (i + 0.5)
        turned = f"rotate(-45 {across:.1f} {top - 8:.1f})"
        parts.append(label(name, left - 8, down + 4, anchor="end"))
        parts.append(
            element("text", escape(name), x=across, y=top - 8, class_="label", transform=turned)
        )
        for j in range(count):
            known = None if i == j else values[i][j]
            share = None if known is None else (shade[i][j] or 0.0) / limit
            corner = (left + cell * j, top + cell * i)
            parts.append(map_cell(known, share, corner, cell, shown=count <= 12))
    told = "; ".join(f"{names[i]} and {names[j]} {_known(values[i][j])}" for i, j in pairs)
    return drawing(
        *parts,
        width=left + cell * count + 40,
        height=top + cell * count + 4,
        title=title,
        description=told,
    )


def _known(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _dot(row: Score, x: Scale, y: float) -> str:
    whisker = ""
    if row.interval is not None:
        low, high = (x(min(max(bound, 0.0), 1.0)) for bound in row.interval)
        whisker = element("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {row.role}")
    name = row.model if len(row.model) <= 20 else f"{row.model[:19]}…"
    return "".join(
        [
            label(name, x.start - 10, y + 4, class_="label", anchor="end"),
            whisker,
            element("circle", cx=x(row.accuracy), cy=y, r=4.2, class_=f"dot {row.role}"),
            label(f"{row.accuracy:.3f}", _WIDTH, y + 4, class_="value", anchor="end"),
        ]
    )


def _curve(
    series: Series, x: Scale, *, top: float, bottom: float, name: str, class_: str
) -> list[str]:
    """Return one plot: its caption, its grid, the raw values faint and their moving mean."""
    parts = [label(name, x.start, top - 6, class_="tick")]
    if not series:
        return [*parts, label("not logged", x.start, (top + bottom) / 2, class_="tick")]
    points = thinned(series)
    y = Scale(0.0, max(value for _, value in points) * 1.05 or 1.0, bottom, top)
    parts += _rows(y, x.start, x.end)
    for drawn, style in ((points, "raw"), (smoothed(points, window=15), "curve")):
        parts.append(line([(x(p), y(v)) for p, v in drawn], class_=f"{style} {class_}"))
    return parts


def map_cell(
    value: float | None,
    share: float | None,
    corner: tuple[float, float],
    cell: float,
    *,
    shown: bool,
) -> str:
    """Draw one cell: its value, on a colour of depth |share| <= 1; blank where it is unknown."""
    left, top = corner
    if value is None or share is None:  # an expert that did not move has no direction
        return element("rect", x=left, y=top, width=cell - 1, height=cell - 1, class_="cell own")
    box = element(
        "rect",
        x=left,
        y=top,
        width=cell - 1,
        height=cell - 1,
        class_=f"cell {'positive' if share >= 0 else 'negative'}",
        fill_opacity=0.06 + 0.94 * abs(share),
    )
    if not shown:
        return box
    deep = "value on" if abs(share) > 0.55 else "value"
    middle = (left + cell / 2, top + cell / 2 + 4)
    return box + label(
        f"{round(value, 2) + 0.0:.2f}", *middle, class_=f"{deep} small", anchor="middle"
    )


def grid(x: Scale, ticks: Sequence[float], top: float, bottom: float) -> str:
    """Draw upright lines at the ticks, and their numbers below."""
    return "".join(
        element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid")
        + label(number(tick), x(tick), bottom + 14, class_="tick", anchor="middle")
        for tick in ticks
    )


def _rows(y: Scale, left: float, right: float) -> list[str]:
    return [
        element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid")
        + label(number(tick), left - 6, y(tick) + 4, class_="tick", anchor="end")
        for tick in y.ticks(3)
    ]


def _below(x: Scale, y: float) -> list[str]:
    return [label(number(tick), x(tick), y, class_="tick", anchor="middle") for tick in x.ticks(4)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.02, 0.08 * (high - low))
    return max(0.0, low - margin), min(1.0, high + margin)
