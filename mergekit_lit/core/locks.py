"""This file keeps a folder to one process at a time, on one machine or on several that share it."""

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import create_text

_MACHINE = Path("/etc/machine-id")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def sole_writer(lock: Path) -> Iterator[None]:
    """Refuse to run the block while another process does.

    The lock is a file that only one process can make, on NFS too, and that says which. A process
    that was killed leaves it behind: on its own machine the next one takes it over; elsewhere
    nobody can tell, so that a person must delete it.

    Args:
        lock: the file, which is gone again after the block. Folders are made for it, and taken away
            if they are still empty then.

    Raises:
        ValueError: another process holds the lock, or may hold it.
        OSError: the file cannot be written.
    """
    made = [folder for folder in lock.absolute().parents if not folder.exists()]
    try:
        _take(lock)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def this_process() -> str:
    """Return what says which process this is, for a file that outlives it."""
    return json.dumps({**_here(), "pid": os.getpid(), "started": _started(os.getpid())})


def is_of_dead(text: str) -> bool:
    """Return whether a process, as `this_process` tells it, is dead for sure.

    It is if it ran on this machine, and runs there no more or the machine was started anew since;
    of others nobody here can tell.
    """
    holder, here = _read(text), _here()
    if holder is None or any(holder.get(key) != here[key] for key in ("host", "machine")):
        return False
    if holder.get("boot") != here["boot"]:
        # Another machine may have the same name, but not the same number too.
        return bool(here["machine"] and here["boot"] and holder.get("boot"))
    if holder.get("namespace") != here["namespace"]:
        return False
    started = _started(holder["pid"])
    return started is None or bool(started and holder["started"] and started != holder["started"])


def _take(lock: Path) -> None:
    mine = this_process()
    while True:
        try:
            create_text(lock, mine)
        except FileExistsError:
            # Its holder may end just now, and take it away.
            with suppress(FileNotFoundError):
                _take_over(lock, mine)
                return
        else:
            return


def _take_over(lock: Path, mine: str) -> None:
    """Put this process in the place of a dead one of this machine."""
    text = lock.read_text(encoding="utf-8", errors="replace")
    if not is_of_dead(text):
        raise _held(lock, text)
    with lock.open("r+", encoding="utf-8") as file:
        try:
            # Only processes of this machine come here; of those, one at a time.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _held(lock, text) from None
        now = file.read()
        if now != text:
            raise _held(lock, now)
        file.seek(0)
        file.truncate()
        file.write(mine)


def _held(lock: Path, text: str) -> ValueError:
    holder = _read(text)
    who = f"process {holder['pid']} on {holder['host']!r}" if holder else "another process"
    return ValueError(
        f"{str(lock.parent)!r} must be written by one process at a time, but {who} is at it. Wait "
        f"for it, or choose another folder; if it is no more, delete {str(lock)!r}."
    )


def _read(text: str) -> Mapping[str, Any] | None:
    """Return what a lock says; None where it is not, or not yet, written whole."""
    try:
        holder = json.loads(text)
        return holder if holder.keys() >= {"host", "pid", "started"} else None
    except (ValueError, AttributeError):
        return None


def _here() -> dict[str, str]:
    """Return where numbers of processes mean the same: machine, its last start, and container.

    What the system does not tell is empty. A machine's own number is not for everybody to read: its
    hash tells as well whether two are one.
    """
    found = {"host": platform.node(), "machine": "", "boot": "", "namespace": ""}
    with suppress(OSError):
        number = _MACHINE.read_bytes().strip()
        found["machine"] = hashlib.sha256(number).hexdigest()[:16] if number else ""
    with suppress(OSError):
        found["boot"] = _BOOT.read_text().strip()
    with suppress(OSError):
        found["namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return found


def _started(pid: int) -> str | None:
    """Return when a process began, as the system counts; None if it runs no more.

    Numbers of processes come back, after a restart of the machine at the latest. Where the system
    does not tell, it is the empty text.
    """
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state == "Z" else fields[18]
