"""This file keeps what went wrong in a run, and when it is to be tried again."""

import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mergekit_lit.core.files import read_json, write_json

FILE = "failure.json"
_BACKOFF_S = 2.0
_LONGEST_S = 300.0
# What a configuration or the data are to blame for: it would fail alike again.
_FINAL = (ValueError, KeyError, TypeError, ImportError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong.

    Attributes:
        launch: which launch of the sweep the run failed in; another one tries again.
        attempts: how often it failed in that launch.
        error: the last error, in one line.
        trace: where it came from.
        due: when to try again, in seconds since 1970; None for never.
    """

    launch: str
    attempts: int
    error: str
    trace: str = ""
    due: float | None = None

    def write(self, folder: Path) -> None:
        """Write the failure to the run's folder."""
        write_json(folder / FILE, asdict(self))


def failure_after(
    error: Exception, before: Failure | None, *, launch: str, retries: int
) -> Failure:
    """Return what to keep of an error.

    Errors of input are final; others are tried again after 2, 4, 8 ... seconds, 300 at most.

    Args:
        error: the error.
        before: what is kept of the same launch so far.
        launch: which launch this is.
        retries: how often a run is tried again.
    """
    attempts = 1 + (before.attempts if before else 0)
    final = isinstance(error, _FINAL) or attempts > retries
    wait = min(_BACKOFF_S * 2 ** (attempts - 1), _LONGEST_S)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return Failure(
        launch=launch,
        attempts=attempts,
        error=" ".join(str(message).split()) or type(error).__name__,
        trace="".join(traceback.format_exception(error)),
        due=None if final else time.time() + wait,
    )


def failure_of(folder: Path, *, launch: str | None = None) -> Failure | None:
    """Return what went wrong in a run, if anything did; that of one launch alone if it is named."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        found = Failure(**read_json(folder / FILE))
        return found if launch in (None, found.launch) else None
    return None


def forget(folder: Path) -> None:
    """Remove what went wrong in a run that is done now."""
    (folder / FILE).unlink(missing_ok=True)
