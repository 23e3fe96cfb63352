"""This file is the index of records: what thousands of JSON files say, in one SQLite file.

The records are the truth. The index holds what a report needs of each, with the time and size of
its file: a record that changed, came or went is noticed, and an index that is missing, damaged or
of another version is made anew, as it is after it was deleted.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lit.core.files import atomic_path
from mergekit_lit.core.records import Record
from mergekit_lit.reports.results import result_rows

INDEX = "records.sqlite"
"""The index's file, in the folder whose records it holds."""

TRAINED = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "displacement",
    "travel",
    "path_length",
    "gradient_norm",
)
"""What is told of each expert beside its task and steps, by the names of its card."""

_VERSION = 1
_COLUMNS = "path, mtime_ns, size, stage, name, finished, settings, results, error"
# No record lies there, but many files do.
_SKIPPED = ("logs", "checkpoints")

_Row: TypeAlias = tuple[str, int, int, str, str, str, str, str, str]


@dataclass(frozen=True)
class Entry:
    """What a report needs of one record.

    Attributes:
        path: the record's file, relative to the folder, with `/`.
        stage: its stage; empty where the record is damaged.
        name: what was made.
        finished: when, in UTC.
        settings: its configuration by dotted key; lists are JSON texts.
        results: a row an expert, or a model and task, of what was measured.
        error: what is wrong with the record; empty if nothing.
    """

    path: str
    stage: str
    name: str
    finished: str
    settings: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]
    error: str = ""


def load_entries(folder: Path, *, index: bool = True) -> list[Entry]:
    """Return what the records below a folder say, by path.

    Args:
        folder: of the records.
        index: whether to read records that did not change from the index, and to bring it up to
            date; without it every record is read, and nothing is written.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"A report needs a run folder, but there is none at {str(folder)!r}."
        )
    before = _read_index(folder / INDEX) if index else {}
    now = {}
    for path, mtime_ns, size in sorted(_files(folder)):
        row = before.get(path)
        # What could not be read may be readable by now, though its file is the same.
        if row is None or row[1:3] != (mtime_ns, size) or row[-1]:
            row = _row(folder, path, mtime_ns, size)
        now[path] = row
    if index and now != before:
        _write_index(folder / INDEX, now.values())
    # JSON files of others that only end like records have no stage.
    return [_entry(row) for row in now.values() if row[3] or row[-1]]


def settings_of(record: Record) -> dict[str, Any]:
    """Return a record's configuration by dotted key, as flags name it; lists become JSON texts.

    What a merge keeps under `recipe` are flags of their own.
    """
    config = dict(record.config)
    recipe = config.pop("recipe", None) or {}
    own = {**recipe, **(recipe.get("config") or {})}
    own.pop("config", None)
    return dict(_leaves({**config, **own}))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def _results(record: Record) -> list[dict[str, Any]]:
    """Return what was measured, without what is not known."""
    rows = result_rows(record)
    if record.stage == "train":
        told = ("task", "steps", *TRAINED)
        cards = record.metrics.get("experts", {}).values()
        rows += [{name: card.get(name) for name in told} for card in cards]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Return relative path, time and size of every file that may be a record."""
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and name[0] != "."]
        for name in files:
            if name.endswith(".record.json") or name == "record.json":
                path = Path(above, name)
                with suppress(FileNotFoundError):  # gone since
                    stat = path.stat()
                    yield path.relative_to(folder).as_posix(), stat.st_mtime_ns, stat.st_size


def _row(folder: Path, path: str, mtime_ns: int, size: int) -> _Row:
    """Read a record; one that is damaged, or none, tells so in its row."""
    try:
        text = (folder / path).read_text(encoding="utf-8")
        value = json.loads(text)
        if not (isinstance(value, dict) and "stage" in value):
            return (path, mtime_ns, size, "", "", "", "{}", "[]", "")
        record = Record(**value)
        told = (record.stage, record.name, record.finished)
        measured = (json.dumps(settings_of(record)), json.dumps(_results(record)))
    except OSError as error:
        return (path, mtime_ns, size, "", "", "", "{}", "[]", error.strerror or str(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told_error = f"It must be a record, but is not: {error}.".replace("\n", " ")
        return (path, mtime_ns, size, "", "", "", "{}", "[]", told_error)
    return (path, mtime_ns, size, *told, *measured, "")


def _entry(row: _Row) -> Entry:
    path, _, _, stage, name, finished, settings, results, error = row
    return Entry(
        path, stage, name, finished, json.loads(settings), tuple(json.loads(results)), error
    )


def _read_index(path: Path) -> dict[str, _Row]:
    """Return the rows of an index by path; none if it is missing, damaged or of another version."""
    if not path.is_file():
        return {}
    # Indices are replaced, never changed: no lock is needed, which some network disks lack.
    address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            if connection.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                return {}
            return {row[0]: row for row in connection.execute(f"SELECT {_COLUMNS} FROM records")}
    except sqlite3.Error:
        return {}


def _write_index(path: Path, rows: Iterable[_Row]) -> None:
    # It only saves time: where it cannot be written, such as on a read-only disk, all is read.
    with (
        suppress(OSError, sqlite3.Error),
        atomic_path(path) as temporary,
        closing(sqlite3.connect(temporary)) as connection,
        connection,
    ):
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute(f"CREATE TABLE records ({_COLUMNS}, PRIMARY KEY (path))")
        connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
