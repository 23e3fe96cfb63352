"""This file is where the twins of an expert are kept: a folder of expert files beside it."""

import re
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"m(?P<m>\d+)-(?P<seed>\d+)\.safetensors")


def twin_path(expert: Path, m: int, seed: int) -> Path:
    """Return the file of one twin, in `<expert>.twins`.

    Args:
        expert: file of the expert that it is a twin of.
        m: samples replaced.
        seed: which neighbouring data set.
    """
    return twins_folder(expert) / f"m{m}-{seed}.safetensors"


def twin_files(expert: Path) -> dict[Path, int]:
    """Return the files of an expert's twins, in order, and how many samples each has replaced."""
    found = {path: _NAME.fullmatch(path.name) for path in sorted(twins_folder(expert).glob("*"))}
    return {path: int(name["m"]) for path, name in found.items() if name is not None}


def remove_twins(expert: Path) -> None:
    """Remove the twins of an expert, and their folder unless it holds something else."""
    for path in twin_files(expert):
        path.unlink()
    with suppress(OSError):
        twins_folder(expert).rmdir()


def twins_folder(expert: Path) -> Path:
    """Return the folder of an expert's twins."""
    return Path(expert).with_suffix(".twins")
