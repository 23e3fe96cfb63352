"""This file keeps what is measured of an expert after or beside its training, in a file beside it.

`<expert>.measured.json` holds the content hash of the expert that the numbers belong to: those of a
file that has been written anew since are dropped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import file_hash, read_json, write_json


def measurements_path(expert: Path) -> Path:
    """Return where the measurements of an expert lie."""
    return Path(expert).with_suffix(".measured.json")


def read_measurements(expert: Path) -> dict[str, Any]:
    """Return what has been measured of an expert file as it is now, by name; empty if nothing."""
    place = measurements_path(expert)
    if not place.is_file():
        return {}
    found = read_json(place)
    return dict(found["measured"]) if found.get("expert") == file_hash(expert) else {}


def add_measurements(expert: Path, measured: Mapping[str, Any]) -> Path:
    """Add measurements of an expert file, over those of the same name, and return their file."""
    place = measurements_path(expert)
    known = read_measurements(expert)
    write_json(place, {"expert": file_hash(expert), "measured": {**known, **measured}})
    return place
