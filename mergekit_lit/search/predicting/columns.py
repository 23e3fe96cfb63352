"""This file is the columns of a table of merges: what each is, and what it takes to know it."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["cards", "data", "probe"]
"""What it takes to know a feature: cards and deltas, training and validation images of the tasks,
or the scores of one merge."""

Row: TypeAlias = dict[str, Any]
"""Values by column."""

UNKNOWN = math.nan
"""The value of a feature that nobody knows: never a guess."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: unique in its table.
        text: what it is, with its unit where it has one.
        type: of its values.
    """

    name: str
    text: str
    type: Literal["float32", "int64", "bool", "string"] = "float32"


KEYS = (
    Column("backbone", "spec of the shared base", "string"),
    Column("suite", "name of the suite or of its folder", "string"),
    Column("real", "whether the images are real ones that do not ship with the package", "bool"),
    Column("group", "name of the group of experts, unique with backbone and suite", "string"),
    Column("uniform", "whether all experts of the group were trained alike", "bool"),
    Column("tasks", "tasks of the group, joined by +", "string"),
    Column("merge", "place of the merge in its group", "int64"),
    Column("method", "merge method", "string"),
    Column("config", "values of the method's parameters that are not its defaults, JSON", "string"),
    Column("looks_at", "what the method looks at beside the experts' weights", "string"),
    Column("task", "task that the row is of", "string"),
    Column("expert", "how the task's expert was trained", "string"),
)
"""What a row is of: a merge and one of its tasks."""

OUTCOMES = (
    Column("test_accuracy", "share of test images that the merge gets right"),
    Column("test_loss", "its cross-entropy on test images; NaN where a logit is not finite"),
    Column("test_expert_accuracy", "share of test images that the task's expert gets right"),
    Column("test_expert_loss", "its cross-entropy on test images"),
    Column("test_base_accuracy", "share of test images that the base gets right"),
    Column("test_base_loss", "its cross-entropy on test images"),
    Column("test_excess_error", "test_loss - test_expert_loss"),
    Column("test_images", "test images of the task that were looked at", "int64"),
)
"""What is to be predicted. All start with `test_`, and no feature does."""

SPREAD = ("mean", "min", "max")


def spread_columns(name: str, text: str, over: str) -> tuple[Column, ...]:
    """Return the columns of `spread`."""
    words = zip(SPREAD, ("mean", "least", "largest"), strict=True)
    return tuple(Column(f"{name}_{word}", f"{text}: {told} over {over}") for word, told in words)


def spread(name: str, values: Iterable[float]) -> Row:
    """Return mean, least and largest of the values that are known; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    told = (statistics.fmean(known), min(known), max(known)) if known else (UNKNOWN,) * 3
    return {f"{name}_{word}": value for word, value in zip(SPREAD, told, strict=True)}


def number(value: float | None) -> float:
    """Return a finite number, or NaN for what is unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else float(value)


def log10(value: float | None) -> float:
    """Return the logarithm of a positive number, NaN for what is none."""
    return math.log10(value) if value is not None and 0 < value < math.inf else UNKNOWN


def joined(*parts: Sequence[Row]) -> list[Row]:
    """Return rows side by side.

    Raises:
        ValueError: a column is in two parts, or the parts differ in length.
    """
    rows = []
    for row in zip(*parts, strict=True):
        names = [name for part in row for name in part]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"Each column must come once, but {twice[0]!r} comes twice.")
        rows.append({name: value for part in row for name, value in part.items()})
    return rows


def checked(row: Row, columns: Sequence[Column]) -> Row:
    """Return a row in the order of its columns.

    Raises:
        ValueError: a column is missing, or one is not declared.
    """
    names = [column.name for column in columns]
    wrong = sorted(set(names) ^ set(row))
    if wrong:
        raise ValueError(
            f"A row must hold exactly the columns that are declared, but {wrong[0]!r} is "
            f"{'missing' if wrong[0] in names else 'none of them'}."
        )
    return {name: row[name] for name in names}


def markdown(parts: Mapping[str, Sequence[Column]]) -> str:
    """Return a table of columns: what each is, and of which part."""
    lines = ["| column | part | type | what it is |", "|---|---|---|---|"]
    for part, columns in parts.items():
        for column in columns:
            # A bar would end the cell.
            text = column.text.replace("|", r"\|")
            lines.append(f"| `{column.name}` | {part} | {column.type} | {text} |")
    return "\n".join(lines)
