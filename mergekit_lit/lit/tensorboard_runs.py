"""This file is TensorBoard: what came of a run, as numbers and as tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lit.core.records import plain
from mergekit_lit.lit.run_facts import Outcome

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check() -> None:
    """Refuse TensorBoard where it is not installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "Logging to TensorBoard needs it installed: pip install 'mergekit-lit[tensorboard]'."
        )


@contextmanager
def writer(folder: Path) -> Iterator["SummaryWriter"]:
    """Open the event file of a run."""
    from torch.utils.tensorboard import SummaryWriter

    opened = SummaryWriter(str(folder))
    try:
        yield opened
    finally:
        opened.close()


def tell(
    events: "SummaryWriter", config: Mapping[str, Any], outcome: Outcome, *, step: int = 0
) -> None:
    """Write settings and tables as text, and the final numbers as scalars."""
    settings = [
        {"setting": key, "value": value} for key, value in leaves({**config, **outcome.config})
    ]
    for name, rows in {"config": settings, **outcome.tables}.items():
        if rows:
            events.add_text(name, _markdown(rows), step)
    for name, value in leaves(outcome.summary):
        if isinstance(value, (int, float)):
            events.add_scalar(f"summary/{name}", value, step)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted key."""
    for key, value in plain(values).items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
