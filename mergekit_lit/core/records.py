"""This file is the record of a run: one JSON from which every reported number can be traced."""

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import read_json, write_json


@dataclass(kw_only=True)
class Record:
    """One run of one stage.

    Attributes:
        stage: `train`, `merge`, `tune`, `sweep`, `evaluate` or `quickstart`.
        name: what was made, such as a task or a merged model.
        config: the resolved configuration.
        inputs: content hash of each file that was read, by path as given.
        seeds: every seed.
        metrics: numbers, by name; NaN is written as null.
        outputs: files written.
        seconds: wall time.
        cpu_seconds: processor time of this process.
        peak_memory_mb: largest resident set of this process, in MB.
        git_commit: commit of the working folder, or None.
        versions: python, torch and ours.
        host: operating system and number of processors.
        finished: when, in UTC.
    """

    stage: str
    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    git_commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    finished: str = ""

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, plain(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a record.

        Raises:
            ValueError: the file is JSON but no record.
        """
        value = read_json(path)
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"{str(path)!r} must be a record, but is not: {error}.") from None

    @classmethod
    def find(cls, path: Path) -> "Record | None":
        """Read a record; None where there is none, or a damaged one."""
        with suppress(FileNotFoundError, ValueError):
            return cls.read(path)
        return None


class Stopwatch:
    """Measures a run from its making to `finish`."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def finish(self, record: Record) -> Record:
        """Fill in the volatile facts of `record` and return it."""
        record.seconds = round(time.perf_counter() - self._wall, 3)
        record.cpu_seconds = round(time.process_time() - self._cpu, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record.peak_memory_mb = round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)
        record.git_commit = git_commit()
        record.versions = {
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "lightning": metadata.version("lightning"),
            "mergekit-lit": metadata.version("mergekit-lit"),
        }
        record.host = {"system": platform.system(), "machine": platform.machine()}
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        return record


def git_commit() -> str | None:
    """Return the commit of the current folder, with `+` if it has changes; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + "+" if _git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """Return JSON values: paths as text, tuples as lists, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
