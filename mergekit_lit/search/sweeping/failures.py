"""This file keeps what went wrong in a run, and when it is to be tried again.

All launches that work at a sweep at once read and write the same file, so that they count together
and wait alike. Only what was given up before a launch began does not count in it.
"""

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
        attempts: how often the run failed, in all launches that worked at it together.
        error: the last error, in one line.
        trace: where it came from.
        due: when to try again, in seconds since 1970; None for never: only a later launch will.
    """

    attempts: int
    error: str
    trace: str = ""
    due: float | None = None

    def write(self, folder: Path) -> None:
        """Write the failure to the run's folder."""
        write_json(folder / FILE, asdict(self))


def failure_after(error: Exception, before: Failure | None, *, retries: int) -> Failure:
    """Return what to keep of an error.

    Errors of input are final; others are tried again after 2, 4, 8 ... seconds, 300 at most.

    Args:
        error: the error.
        before: what went wrong so far.
        retries: how often a run is tried again.
    """
    attempts = 1 + (before.attempts if before else 0)
    final = isinstance(error, _FINAL) or attempts > retries
    wait = min(_BACKOFF_S * 2 ** (attempts - 1), _LONGEST_S)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return Failure(
        attempts=attempts,
        error=" ".join(str(message).split()) or type(error).__name__,
        trace="".join(traceback.format_exception(error)),
        due=None if final else time.time() + wait,
    )


def failure_of(folder: Path, *, begun: float | None = None) -> Failure | None:
    """Return what went wrong in a run, if anything did.

    Args:
        folder: the run's folder.
        begun: when a launch began, as the file server tells it: what was given up before is left
            out, to be tried again.
    """
    with suppress(FileNotFoundError, ValueError, TypeError):
        found = Failure(**read_json(folder / FILE))
        if found.due is None and begun is not None:
            return found if (folder / FILE).stat().st_mtime >= begun else None
        return found
    return None


def forget(folder: Path) -> None:
    """Remove what went wrong in a run that is done now."""
    (folder / FILE).unlink(missing_ok=True)
