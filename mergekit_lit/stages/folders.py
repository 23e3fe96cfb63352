"""This file is folders of results: what they are known by, and whether they can be written."""

import os
from pathlib import Path

from mergekit_lit.core.records import Record

SWEEP_FILE = "sweep.yaml"
"""What was swept, in the sweep's folder from its start on."""
SWEEP_RECORD = "sweep.record.json"
"""What came of it, from its end on."""


def check_folder(out: Path) -> None:
    """Refuse a folder of results that cannot be one; nothing is made.

    Raises:
        ValueError: `out` or a folder above it is a file.
        PermissionError: nothing may be written there.
    """
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(
            f"`out` must be a folder, but {str(nearest)!r} is a file. Choose another folder."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`out` must be a folder that can be written, but {str(nearest)!r} cannot. "
            "Choose another folder."
        )


def check_record_name(out: Path) -> None:
    """Refuse the name of a record that is not a JSON file's.

    Raises:
        ValueError: `out` has another ending, or none.
    """
    if out.suffix != ".json":
        raise ValueError(
            f"`out` must be a record's file, ending in .json, but is {str(out)!r}. Name it "
            f"{f'{out}.json'!r}."
        )


def check_no_file_name(out: Path) -> None:
    """Refuse a name for a folder, or for a record, that ends like another kind of file.

    A folder that is there may have any name, and one such as `lr0.01` has no ending.

    Raises:
        ValueError: `out` ends in a dot and a word, other than `.json`.
    """
    if out.suffix[1:2].isalpha() and out.suffix != ".json" and not out.is_dir():
        raise ValueError(
            f"`out` must be a folder, or a file ending in .json, but is {str(out)!r}. Leave out "
            f"{out.suffix!r}, or make that folder first."
        )


def check_record(path: Path, stage: str) -> None:
    """Refuse to overwrite the record of another stage, such as that of an expert's training.

    Args:
        path: where a record is wanted.
        stage: that it is of.

    Raises:
        ValueError: another stage's record is there, or a file that is no record.
    """
    if not path.is_file():
        return
    found = Record.read(path).stage
    if found != stage:
        raise ValueError(
            f"The record {str(path)!r} must not be overwritten: it is of the stage {found!r}, not "
            f"{stage!r}. Choose another name or `out`."
        )
