"""This file is a worker of a sweep: it takes runs nobody is at until none is left.

Launchers differ only in where they start workers. What they share is the sweep's folder: whoever
can write it, on whatever machine, may work at it; claims keep two from doing the same run.
"""

import _thread
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mergekit_lit.lit.preemption import leave_if_told, preemptible
from mergekit_lit.search.sweeping.claims import BEAT_S, SILENT_S, Claim, held, take
from mergekit_lit.search.sweeping.failures import Failure, failure_after, failure_of, forget
from mergekit_lit.search.sweeping.jobs import Job
from mergekit_lit.search.sweeping.plan import Plan, Run

State: TypeAlias = Literal["done", "found", "failed", "busy", "later"]
"""Done here; done before; failed for good; another process is at it; to be tried again later."""

Listen: TypeAlias = Callable[[str, str, str], None]
"""Is told of each run: `begun`, or the state; its name; and the error, if any."""

_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What every worker of a launch is given.

    Attributes:
        plan: all runs.
        job: how to do one.
        out: the sweep's folder; each run has `runs/<name>` in it.
        launch: identifies the launch: retries are counted in each anew.
        retries: how often a run that failed, or whose process died, is tried again.
        beat_s: seconds between two signs of life.
        silent_s: silence after which a worker of another machine counts as dead, in seconds.
    """

    plan: Plan
    job: Job
    out: Path
    launch: str
    retries: int = 2
    beat_s: float = BEAT_S
    silent_s: float = SILENT_S

    def folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / run.name

    def is_done(self, run: Run) -> bool:
        """Return whether all of a run is done."""
        return self.job.is_done(self.folder(run), run.steps)


def work(sweep: Sweep, listen: Listen, *, place: int = 0, workers: int = 1) -> None:
    """Do runs until each is done or has failed for good.

    Runs that others are at are waited for: should their process die, this one goes on with them.
    Where this process is told to end (`lit.preemption`), a training keeps what it has, the claim is
    given back, and another worker goes on with the run at once.

    Args:
        sweep: what to do.
        listen: is told of each run.
        place: number of this worker; each begins in another part of the plan, so that what a
            worker has loaded serves its next run too.
        workers: how many there are.
    """
    runs = sweep.plan.runs
    first = place * len(runs) // workers
    left = [*runs[first:], *runs[:first]]
    with preemptible():
        while left:
            states = {}
            for run in left:
                leave_if_told()
                states[run.name] = state = _attempt(sweep, run, listen)
                if state not in ("busy", "later"):
                    listen(state, run.name, _error(sweep, run) if state == "failed" else "")
            left = [run for run in left if states[run.name] in ("busy", "later")]
            if left and "done" not in states.values():
                time.sleep(_POLL_S)


def _attempt(sweep: Sweep, run: Run, listen: Listen) -> State:
    """Do a run, unless it is done, failed for good, or another process is at it."""
    folder = sweep.folder(run)
    known = _known(sweep, run)
    if known:
        return known
    claim = take(folder, launch=sweep.launch, silent_s=sweep.silent_s)
    if claim is None:
        return "busy"
    with held(claim, _lose, beat_s=sweep.beat_s):
        # Its last holder may have ended while this process looked.
        known = _known(sweep, run)
        if known:
            return known
        listen("begun", run.name, "")
        return _execute(sweep, run, claim)


def _known(sweep: Sweep, run: Run) -> State | None:
    """Return what is known of a run without doing it; None if it is to be done now."""
    if sweep.is_done(run):
        return "found"
    failure = failure_of(sweep.folder(run), launch=sweep.launch)
    if failure is None:
        return None
    if failure.due is None:
        return "failed"
    return "later" if failure.due > time.time() else None


def _execute(sweep: Sweep, run: Run, claim: Claim) -> State:
    folder, deaths = sweep.folder(run), claim.deaths()
    if deaths > sweep.retries:
        Failure(
            launch=sweep.launch,
            attempts=deaths,
            error=f"Its process died {deaths} times: it was killed, or there was too little "
            "memory. Start again with fewer `jobs`.",
        ).write(folder)
        return "failed"
    try:
        sweep.job.execute(sweep.plan.config(run), folder, run.steps)
    # One run must not end the sweep, whatever is wrong with it.
    except Exception as error:
        before = failure_of(folder, launch=sweep.launch)
        failure = failure_after(error, before, launch=sweep.launch, retries=sweep.retries)
        failure.write(folder)
        return "failed" if failure.due is None else "later"
    forget(folder)
    return "done"


def _error(sweep: Sweep, run: Run) -> str:
    failure = failure_of(sweep.folder(run))
    return failure.error if failure else ""


def _lose() -> None:
    """Leave the run to whoever took it over, from the main thread."""
    _thread.interrupt_main()
