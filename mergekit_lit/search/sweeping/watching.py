"""This file watches a sweep whose workers are elsewhere, by what they leave in its folder."""

import time
from collections.abc import Callable
from contextlib import suppress

from mergekit_lit.search.sweeping.failures import failure_of
from mergekit_lit.search.sweeping.plan import Run
from mergekit_lit.search.sweeping.worker import Listen, Sweep

_POLL_S = 2.0
# Share of the time that looking at the folder may take.
_LOOKING = 0.05


def watch(sweep: Sweep, listen: Listen, ended: Callable[[], bool]) -> None:
    """Tell of each run as it ends, until the workers have.

    Args:
        sweep: what they do.
        listen: is told of each run that is done, or has failed.
        ended: whether all workers have ended.
    """
    left = list(sweep.plan.runs)
    while True:
        over = ended()
        begun = time.monotonic()
        left = [run for run in left if not _tell(sweep, run, listen)]
        if over:
            return
        time.sleep(max(_POLL_S, (time.monotonic() - begun) / _LOOKING))


def _tell(sweep: Sweep, run: Run, listen: Listen) -> bool:
    """Tell of a run that has ended; return whether it has."""
    # A worker elsewhere may be writing just now.
    with suppress(OSError, ValueError):
        if sweep.is_done(run):
            listen("done", run.name, "")
            return True
        failure = failure_of(sweep.folder(run), begun=sweep.begun)
        if failure and failure.due is None:
            listen("failed", run.name, failure.error)
            return True
    return False
