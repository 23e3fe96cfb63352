"""This file writes the report of a sweep: which settings matter, and which did best."""

from collections.abc import Mapping, Sequence

from mergekit_lit.reports import tables
from mergekit_lit.reports.figures import panels
from mergekit_lit.reports.filters import Row, chosen, read_conditions
from mergekit_lit.reports.index import Entry
from mergekit_lit.reports.markup import (
    Cell,
    block,
    document,
    escaped,
    flags,
    folded,
    measured,
    paragraph,
    section,
    table,
)
from mergekit_lit.reports.sweep_figures import level_panel, score_map
from mergekit_lit.reports.sweeps import (
    Configuration,
    Level,
    by_method_and_task,
    configurations,
    effect,
    factors,
    is_adapted,
    marginal,
    objective_of,
    scored,
    smaller_is_better,
    sweep_rows,
)

_MOST_CONFIGURATIONS = 25
_MOST_LEVELS = 24
_MOST_FLAGS = 12


def sweep_page(
    entries: Sequence[Entry],
    *,
    title: str,
    where: str | None = None,
    objective: str | None = None,
    file: str = "",
    failed: Mapping[str, str] | None = None,
) -> str:
    """Return the whole page of a sweep.

    Args:
        entries: what its records say.
        title: heading.
        where: conditions that results must meet; see `filters.read_conditions`.
        objective: what results are compared by; the usual measure if not given.
        file: text of the sweep's YAML file.
        failed: error of each run that failed, by name.

    Raises:
        KeyError: an unknown name in `where` or `objective`.
        ValueError: wrong conditions, or nothing is left to report.
    """
    every = sweep_rows(entries)
    kept = chosen(every, read_conditions(where)) if where is not None else every
    objective = objective_of(kept, objective)
    rows = scored(kept, objective)
    varied = factors(rows)
    found = configurations(rows, objective, varied=varied, most=_MOST_CONFIGURATIONS)
    return document(
        title,
        _opening(title, rows, found, objective, where),
        flags([*_damaged(entries), *_failures(failed or {})]),
        _best_table(found, objective, varied),
        _effects(rows, objective),
        _methods(kept, objective),
        section("Where the numbers come from", *_sources(entries, file)),
    )


def _opening(
    title: str,
    rows: Sequence[Row],
    found: Sequence[Configuration],
    objective: str,
    where: str | None,
) -> str:
    lead = f"{len(rows):,} results of {len({row['record'] for row in rows}):,} records"
    lead += f" where {where}" if where else ""
    better = "smaller" if smaller_is_better(objective) else "larger"
    lead += f", compared by {objective}; {better} is better."
    values = ", ".join(f"{name} {_text(value)}" for name, value in found[0].values.items())
    best = f'<ul class="key"><li class="merged"><b>{tables.number(found[0].mean)}</b>'
    best += f"<span>best {escaped(objective)}<br>{escaped(values)}</span></li></ul>"
    return f"<header><h1>{escaped(title)}</h1>{paragraph(lead, class_='lead')}{best}</header>"


def _best_table(found: Sequence[Configuration], objective: str, varied: Sequence[str]) -> str:
    names = list(found[0].values)
    rows = [
        [
            Cell(f"#{place}"),
            measured(each.mean, each.interval),
            Cell(str(each.count), each.count),
            *(_value(each.values[name]) for name in names),
            Cell(each.record),
        ]
        for place, each in enumerate(found, start=1)
    ]
    pooled = [name for name in varied if name not in names]
    over = f" Each is a mean over {', '.join(pooled)}." if pooled else ""
    return section(
        "Best configurations",
        paragraph(
            f"The best {len(found)}.{over} Brackets hold the 95 % interval over seeds (Student's). "
            "Configurations that lack results of others come after them, and last those of methods "
            "that have seen test images (role adapted). The best of many looks better than it is: "
            "measure it again, on other images or seeds, before it is quoted."
        ),
        table(
            "Best configurations",
            ("place", objective, "results", *names, "one of its records"),
            rows,
        ),
    )


def _effects(rows: Sequence[Row], objective: str) -> str:
    plain = [row for row in rows if not is_adapted(row)] or rows
    levels = {name: marginal(plain, name, objective) for name in factors(plain)}
    if not levels:
        return ""
    shown = [level for each in levels.values() for level in each[:_MOST_LEVELS]]
    ends = _ends(shown)
    order = sorted(levels, key=lambda name: -effect(levels[name]))
    return section(
        "What each setting changes",
        paragraph(
            f"The mean of {objective} at each value of a setting over all else that varies, and a "
            "bar from the 10th to the 90th percentile of the results. The setting whose means lie "
            "farthest apart comes first; all share one axis. A difference says little where values "
            "of one setting came with other values of another. Methods that have seen test "
            "images are left out beside others."
        ),
        panels(
            {
                name: level_panel(
                    _titled(name, levels[name]), levels[name][:_MOST_LEVELS], ends=ends
                )
                for name in order
            }
        ),
        folded("The same as a table", _effect_table({name: levels[name] for name in order})),
    )


def _effect_table(levels: Mapping[str, Sequence[Level]]) -> str:
    rows = [
        [
            Cell(name),
            Cell(level.label),
            measured(level.mean, (level.low, level.high)),
            Cell(str(level.count), level.count),
        ]
        for name, each in levels.items()
        for level in each[:_MOST_LEVELS]
    ]
    columns = ("setting", "value", "mean [10th, 90th percentile]", "results")
    return table("Means by setting", columns, rows)


def _methods(rows: Sequence[Row], objective: str) -> str:
    methods, tasks, values = by_method_and_task(rows, objective)
    if not methods:
        return ""
    return section(
        "Each method on each task",
        paragraph(
            f"The mean of {objective} over all else that varies, so that a method pays for its bad "
            "settings too; choose settings by --where. The best method by the mean over the "
            "tasks stands first; (test) marks those that have seen test images, which come last."
        ),
        score_map(methods, tasks, values),
    )


def _sources(entries: Sequence[Entry], file: str) -> list[str]:
    stages = sorted({entry.stage for entry in entries if entry.stage})
    last = max((entry.finished for entry in entries), default="")
    told = f"{len(entries):,} records of {', '.join(stages)}; the last finished {last or 'never'}."
    parts = [paragraph(told)]
    return [*parts, folded("The sweep's file", block(file))] if file else parts


def _damaged(entries: Sequence[Entry]) -> list[str]:
    bad = [entry for entry in entries if entry.error]
    told = [f"{entry.path} is left out: {entry.error}" for entry in bad[:_MOST_FLAGS]]
    return [*told, *_more(len(bad), "damaged records")]


def _failures(failed: Mapping[str, str]) -> list[str]:
    told = [f"Run {name} failed: {error}" for name, error in list(failed.items())[:_MOST_FLAGS]]
    return [*told, *_more(len(failed), "failed runs")]


def _more(count: int, what: str) -> list[str]:
    return [f"{count - _MOST_FLAGS:,} more {what}."] if count > _MOST_FLAGS else []


def _titled(name: str, levels: Sequence[Level]) -> str:
    more = len(levels) > _MOST_LEVELS
    return f"{name} (best {_MOST_LEVELS} of {len(levels)})" if more else name


def _ends(levels: Sequence[Level]) -> tuple[float, float]:
    reached = [bound for level in levels for bound in (level.low, level.mean, level.high)]
    margin = 0.04 * (max(reached) - min(reached)) or 0.01
    return min(reached) - margin, max(reached) + margin


def _value(value: object) -> Cell:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return Cell(_text(value), number)


def _text(value: object) -> str:
    if value is None:
        return tables.UNKNOWN
    return f"{value:g}" if isinstance(value, float) else str(value)
