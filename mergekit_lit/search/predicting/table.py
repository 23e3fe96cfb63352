"""This file is the table of merges on disk: Parquet, one row a merge and task, typed columns."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, get_args

from mergekit_lit.core.files import atomic_path
from mergekit_lit.search.predicting import cards, data, deltas
from mergekit_lit.search.predicting.columns import (
    KEYS,
    OUTCOMES,
    Column,
    Level,
    Row,
    checked,
    markdown,
)

SHIPPED = Path("shipped")
"""Stands for the table that comes with the package."""

_FILE = Path(__file__).parent / "files" / "merges.parquet"

FEATURES: Mapping[Level, tuple[Column, ...]] = MappingProxyType(
    {
        "cards": (*cards.COLUMNS, *deltas.COLUMNS),
        "data": data.DATA_COLUMNS,
        "probe": data.PROBE_COLUMNS,
    }
)
"""What each level of information adds: all that a predictor may look at."""

COLUMNS: tuple[Column, ...] = (*KEYS, *(c for own in FEATURES.values() for c in own), *OUTCOMES)


def feature_names(level: Level) -> list[str]:
    """Return what is known at a level: its own features and those of the levels below."""
    below = get_args(Level)[: get_args(Level).index(level) + 1]
    return [column.name for each in below for column in FEATURES[each]]


def columns_told() -> str:
    """Return the table of all columns as Markdown."""
    features: dict[str, Sequence[Column]] = dict(FEATURES.items())
    return markdown({"key": KEYS, **features, "outcome": OUTCOMES})


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write rows with exactly the columns above, atomically; NaN and None are what is unknown.

    Args:
        path: ends in `.parquet`.
        rows: as made by the functions of this package.

    Raises:
        ValueError: a row lacks a column, or has another.
        ModuleNotFoundError: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    found = [checked(row, COLUMNS) for row in rows]
    fields = [
        arrow.field(c.name, _type(arrow, c), metadata={"description": c.text}) for c in COLUMNS
    ]
    table = arrow.table(
        {c.name: _values(c, [row[c.name] for row in found]) for c in COLUMNS},
        schema=arrow.schema(fields),
    )
    with atomic_path(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd", compression_level=19)


def table_file(path: Path) -> Path:
    """Return the file of a table, which `SHIPPED` stands for, too."""
    return _FILE if Path(path) == SHIPPED else Path(path)


def read_table(path: Path, names: Sequence[str] | None = None) -> list[Row]:
    """Return the rows that `write_table` wrote; what is unknown is NaN.

    Args:
        path: of the table, or `SHIPPED`.
        names: columns to read; all of them by default.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: the file is no table, or lacks a column.
    """
    arrow, parquet = _arrow()
    file = table_file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"No table of merges {str(path)!r}. Build one: python experiments/merges.py."
        )
    try:
        found = set(parquet.read_schema(file).names)
    except arrow.ArrowInvalid:
        raise ValueError(f"{str(path)!r} must be a table of merges, but is no Parquet.") from None
    missing = sorted(set(names or ()) - found)
    if missing:
        raise ValueError(
            f"`table` must hold merges with the column {missing[0]!r}, but {str(path)!r} does not. "
            "Build one: python experiments/merges.py."
        )
    table = parquet.read_table(file, columns=list(names) if names else None)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _values(column: Column, values: Sequence[Any]) -> Sequence[Any]:
    # A record on disk has null for NaN.
    if column.type == "float32":
        return [float("nan") if value is None else value for value in values]
    return values


def _type(arrow: ModuleType, column: Column) -> Any:
    return arrow.bool_() if column.type == "bool" else getattr(arrow, column.type)()


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'Tables of merges need pyarrow: pip install -e ".[predict]".'
        ) from None
    return pa, parquet
