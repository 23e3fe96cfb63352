"""This file is what experiments find finished: records, and the tables that are made of them.

It is a module, not a command.
"""

import csv
import gzip
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import read_json
from mergekit_lit.core.records import Record, plain


def stem_of(name: str) -> str:
    """Return the stem of the record of something that has a name: letters, digits and hyphens."""
    return "".join(c if c.isalnum() else "-" for c in name)


def check_same(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a finished record of another configuration than the one wanted.

    Folders may differ, that of the suite too, but not its name; and so may whole entries that the
    record does not have, which other versions of a script wrote.

    Raises:
        ValueError: the configurations differ.
    """
    if not path.is_file():
        return
    found = Record.read(path).config
    told = [
        f"`{name}` ({_short(there)} there, {_short(here)} now)"
        for key, value in config.items()
        if key in found
        for name, there, here in _differences(key, found[key], value)
    ]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise ValueError(
            f"{str(path)!r} must be a record of this configuration, but differs in "
            f"{', '.join(told[:3])}{more}. Choose another --out."
        )


def _differences(name: str, there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    """Return what differs between a record's value and one that is to be recorded."""
    if isinstance(here, Path):
        return []
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        keys = dict.fromkeys([*map(str, here), *there])
        new = {str(key): value for key, value in here.items()}
        pairs = [(f"{name}.{key}", there.get(key), new.get(key)) for key in keys]
        return [found for pair in pairs for found in _differences(*pair)]
    if isinstance(here, (list, tuple)) and isinstance(there, list) and len(here) == len(there):
        pairs = [(f"{name}.{i}", *both) for i, both in enumerate(zip(there, here, strict=True))]
        return [found for pair in pairs for found in _differences(*pair)]
    if name.endswith("suite"):
        there, here = Path(str(there)).name, Path(str(here)).name
    return [] if there == plain(here) else [(name, there, here)]


def _short(value: Any) -> str:
    text = repr(plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_table(path: Path, script: str, columns: Collection[str]) -> list[dict[str, Any]]:
    """Return the rows of a CSV, which gzip may have packed; numbers as numbers, NaN where none.

    Args:
        path: the file.
        script: what writes such tables.
        columns: those that it must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}.")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{str(path)!r} must be a CSV table, but is not: {error}.") from None
    if not rows:
        raise ValueError(f"{str(path)!r} must hold rows, but holds none.")
    if missing := [name for name in columns if name not in rows[0]]:
        raise ValueError(
            f"{str(path)!r} must be a table of {script}, but lacks the columns "
            f"{', '.join(missing)}."
        )
    return [{name: _value(name, cell) for name, cell in row.items()} for row in rows]


def _value(name: str, cell: str | None) -> Any:
    """Return a number, NaN where the cell is empty; True, False; or a word, by the column."""
    if name in _WORDS:
        return cell
    return cell == "True" if cell in ("True", "False") else float(cell or "nan")


_WORDS = ("backbone", "schedule", "group", "mix", "row", "task")


def rows_in(records: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of the records that are finished."""
    made = [path for path in records if path.is_file()]
    return [row for path in made for row in read_json(path)["metrics"]["rows"]]
