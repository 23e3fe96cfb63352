"""This file writes whole files or none: atomic writes, JSON, content hashes."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds.

    A reader sees the old file or the new one, never a part; a failed block leaves nothing behind.
    Parent folders are made.

    Raises:
        OSError: the folder cannot be written (full disk, read-only), in one line that says where.
    """
    with atomic_paths([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_paths(
    paths: Sequence[Path], *, gone_first: Sequence[Path] = (), gone_last: Sequence[Path] = ()
) -> Iterator[list[Path]]:
    """Yield a temporary path beside each of `paths`; when the block succeeds all are replaced.

    Each file is whole or absent, whatever happens; a failed block changes nothing. That the files
    belong together, a last one can say that names the others: give its old version to
    `gone_first`, and it stands only while all that it names are there.

    Args:
        paths: files, replaced in this order.
        gone_first: files that are removed before the first is replaced.
        gone_last: files that are removed after the last was replaced.

    Raises:
        OSError: a folder cannot be written, in one line that says where.
    """
    temporaries: list[Path] = []
    ready = _Ready(temporaries, paths, gone_first, gone_last)
    waiting, waits = _WAITING.get(), False
    now = Path()
    try:
        try:
            for now in map(Path, paths):
                now.parent.mkdir(parents=True, exist_ok=True)
                if now.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                handle, name = tempfile.mkstemp(prefix=f".{now.name}.", dir=now.parent)
                os.close(handle)
                temporaries.append(Path(name))
            yield list(temporaries)
            for temporary in temporaries:
                _sync(temporary)
                # mkstemp makes private files; results follow the user's umask like any other file.
                temporary.chmod(0o666 & ~_umask())
        except OSError as error:
            raise _told(error, now) from error
        if waiting is None:
            ready.take_places()
        else:
            waiting.append(ready)
            waits = True
    finally:
        if not waits:
            ready.remove()


@contextmanager
def together() -> Iterator[None]:
    """Let all files that are written in the block take their places at its end, or none of them.

    A reader sees the old ones until then. They take their places in the order in which they were
    written, one rename after the other; a failed block changes nothing and leaves nothing behind.
    """
    waiting: list[_Ready] = []
    before = _WAITING.set(waiting)
    try:
        yield
        for ready in waiting:
            ready.take_places()
    finally:
        _WAITING.reset(before)
        for ready in waiting:
            ready.remove()


@dataclass(frozen=True)
class _Ready:
    """Files that are written, and wait to take their places."""

    temporaries: Sequence[Path]
    paths: Sequence[Path]
    gone_first: Sequence[Path]
    gone_last: Sequence[Path]

    def take_places(self) -> None:
        _unlink(self.gone_first)
        for temporary, path in zip(self.temporaries, map(Path, self.paths), strict=True):
            try:
                temporary.replace(path)
            except OSError as error:
                raise _told(error, path) from error
        _unlink(self.gone_last)

    def remove(self) -> None:
        _unlink(self.temporaries)


_WAITING: ContextVar[list[_Ready] | None] = ContextVar("_WAITING", default=None)
"""What waits for the end of `together`; None outside it."""


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def remove_unfinished(folder: Path, names: str = "*") -> None:
    """Remove what killed processes left of files that they were writing atomically.

    Args:
        folder: where; nobody may be writing such files there.
        names: pattern of the files' own names.
    """
    # What mkstemp adds is eight characters long.
    for path in folder.glob(f".{names}.{'?' * 8}"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a file that was not there, on NFS too: of several, one succeeds.

    Parent folders are made.

    Raises:
        FileExistsError: the file is there.
        OSError: the file cannot be written; it is then not there.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                Path(path).unlink()
                raise
    except FileExistsError:
        raise
    except OSError as error:
        raise _told(error, Path(path)) from error


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write `text` as UTF-8 at the end of a file that is there; all of it, or nothing.

    Args:
        path: the file.
        text: what is added.
        durable: whether to wait until it is on the disk, so that a loss of power leaves it there.

    Raises:
        OSError: the file cannot be written.
    """
    content = text.encode()
    try:
        with Path(path).open("ab", buffering=0) as file:
            before = file.tell()
            # A full disk takes what still fits, and refuses the rest at the next call.
            if file.write(content) < len(content):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise _told(error, Path(path)) from error


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"No file {str(path)!r}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} must be a JSON file, but is not: {error}.") from None


def has_content(path: Path) -> bool:
    """Return whether a file is there, and not empty as a machine that went down may leave it."""
    return path.is_file() and path.stat().st_size > 0


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(error: OSError, path: Path) -> OSError:
    """Return the error with a message that says which file and why, of the same class."""
    reason = error.strerror or str(error)
    told = type(error)(f"Could not write {str(path)!r}: {reason}. Nothing was left half-written.")
    told.errno = error.errno
    return told


def _sync(path: Path) -> None:
    """Force the bytes to the disk, so that a rename never precedes its contents."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
