"""This file lets one process at a time, of any machine that shares a folder, work at a run.

A claim is a numbered file, `claim.1`, made exclusively, which is atomic on NFS too. Its holder
touches it from time to time. Whoever finds the holder dead, or silent for long, makes the file of
the next number, which again only one can do: nothing is ever renamed or taken away from another, so
that no two can both believe that they took over. A holder that was only slow finds the higher
number at its next beat, and leaves. Ages are differences of two times that the file server set:
clocks of machines need not agree.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from mergekit_lit.core.files import create_text
from mergekit_lit.core.locks import is_of_dead, this_process

_STEM = "claim."
BEAT_S = 20.0
"""Seconds between two signs of life of a holder."""
SILENT_S = 200.0
"""Silence after which a holder counts as dead; NFS may show times that are a minute old."""


@dataclass(frozen=True)
class Claim:
    """The right to work at a run.

    Attributes:
        folder: the run's folder.
        number: how many processes have held it before, and one.
    """

    folder: Path
    number: int

    @property
    def path(self) -> Path:
        """The claim's file."""
        return self.folder / f"{_STEM}{self.number}"

    def beat(self) -> bool:
        """Give a sign of life, and return whether the claim still holds."""
        with suppress(OSError):
            os.utime(self.path)
            return max(_numbers(self.folder), default=0) == self.number
        return False

    def deaths(self, begun: float) -> int:
        """Return how many holders died at this run.

        Args:
            begun: since when, as `server_time` tells it: who was silent by then does not count.
        """
        beats = (_last_beat(self.folder, number) for number in range(1, self.number))
        return sum(beat is not None and beat >= begun for beat in beats)

    def release(self) -> None:
        """Give the claim back, and remove those of the dead before it."""
        for number in range(1, self.number + 1):
            (self.folder / f"{_STEM}{number}").unlink(missing_ok=True)


def take(folder: Path, *, silent_s: float = SILENT_S) -> Claim | None:
    """Take a run; None where another process is at it.

    Whether the run is still to be done must be looked at afterwards: its last holder may have
    ended, and given the claim back, just before.

    Args:
        folder: the run's folder, made if it is not there.
        silent_s: silence after which a holder counts as dead, in seconds.

    Raises:
        OSError: the folder cannot be written.
    """
    number = max(_numbers(folder), default=0)
    before = _text(folder, number)
    if number and _holds(folder, number, before, silent_s):
        return None
    claim = Claim(folder, number + 1)
    try:
        create_text(claim.path, this_process())
    except FileExistsError:
        return None
    if _text(folder, number) != before:
        # Somebody took over, ended and gave back since this process looked; who is next has a 1.
        claim.path.unlink(missing_ok=True)
        return None
    return claim


def server_time(folder: Path) -> float:
    """Return the time as the server of a folder's files has it, in seconds since 1970."""
    clock = folder / ".clock"
    clock.touch()
    os.utime(clock)
    return clock.stat().st_mtime


@contextmanager
def held(claim: Claim, lost: Callable[[], None], *, beat_s: float = BEAT_S) -> Iterator[None]:
    """Keep a claim alive during the block, and give it back afterwards.

    Args:
        claim: what was taken.
        lost: called, in another thread, where somebody else has taken over.
        beat_s: seconds between two signs of life.
    """
    over = Event()

    def beat() -> None:
        while not over.wait(beat_s):
            if not claim.beat():
                lost()
                return

    heart = Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        claim.release()


def _holds(folder: Path, number: int, text: str, silent_s: float) -> bool:
    """Return whether the holder of a claim lives, as far as anybody can tell."""
    if is_of_dead(text):
        return False
    last = _last_beat(folder, number)
    return last is None or server_time(folder) - last < silent_s


def _last_beat(folder: Path, number: int) -> float | None:
    """Return the last sign of life of a claim's holder; None where the claim was given back."""
    with suppress(FileNotFoundError):
        return (folder / f"{_STEM}{number}").stat().st_mtime
    return None


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the claims of a run."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    ends = (name.removeprefix(_STEM) for name in names if name.startswith(_STEM))
    return [int(end) for end in ends if end.isdecimal()]


def _text(folder: Path, number: int) -> str:
    with suppress(OSError):
        return (folder / f"{_STEM}{number}").read_text(encoding="utf-8", errors="replace")
    return ""
