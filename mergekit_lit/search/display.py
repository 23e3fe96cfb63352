"""This file is what a person sees of the quickstart: bars while it runs, tables at the end."""

from types import TracebackType

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from mergekit_lit.core.records import Record
from mergekit_lit.reports import tables
from mergekit_lit.reports.tables import Score


class Display:
    """One bar for each piece of work, with a note such as the loss."""

    def __init__(self, console: Console) -> None:
        """Choose where to draw."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, to stay."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Draw or move the bar `name`; its clock starts at the second call."""
        if name not in self._bars:
            bar = self._progress.add_task(name, total=total, start=False, note=note)
            self._bars[name] = bar
            return
        self._progress.start_task(self._bars[name])
        self._progress.update(self._bars[name], completed=done, total=total, note=note)


def results(record: Record) -> Group:
    """Return what the terminal shows of an evaluation: means, tasks, and what they say."""
    rows = tables.scores(record)
    averages = tables.means(rows)
    said = tables.verdict(rows)
    warnings = [Text(f"! {text}", style="yellow") for text in record.metrics.get("warnings", ())]
    lines = [Text(said[1], style="bold" if said[0] else "bold red")] if said else []
    return Group(_means(averages), "", _tasks(rows, averages), "", *warnings, *lines)


def _means(averages: list[Score]) -> Table:
    split = averages[0].split if averages else ""
    title = f"Mean over the tasks, {split} images, 95 % intervals over images"
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("uses")
    for name in ("λ", "accuracy", "interval", "normalised"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in averages:
        table.add_row(
            row.model,
            row.data or "",
            "" if row.scale is None else f"{row.scale:g}",
            tables.number(row.accuracy),
            tables.interval(row.interval),
            tables.number(row.normalised),
        )
    return table


def _tasks(rows: list[Score], averages: list[Score]) -> Table:
    """Return accuracy by task of the base, the merge to quote and the experts."""
    merge = tables.headline(averages)
    shown = [row for row in averages if row.role in ("base", "expert") or row == merge]
    models = [row.model for row in shown]
    table = Table(title="Accuracy by task", title_justify="left")
    table.add_column("task")
    for model in models:
        table.add_column(model, justify="right")
    for task in tables.tasks(rows):
        found = tables.by_task(rows, task)
        cells = [found[model].accuracy if model in found else None for model in models]
        table.add_row(task, *(tables.number(value) for value in cells))
    return table
