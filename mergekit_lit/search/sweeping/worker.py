"""This file is a worker of a sweep: it takes runs nobody is at until none is left.

Launchers differ only in where they start workers. What they share is the sweep's folder: whoever
can write it, on whatever machine, may work at it; claims keep two from doing the same run.
"""

import _thread
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from mergekit_lit.lit.preemption import leave_if_told, preemptible
from mergekit_lit.search.sweeping.claims import BEAT_S, SILENT_S, Claim, held, take
from mergekit_lit.search.sweeping.failures import Failure, failure_after, failure_of, forget
from mergekit_lit.search.sweeping.jobs import Alike, Job
from mergekit_lit.search.sweeping.lockstep import (
    CREW,
    LockstepMode,
    crews,
    execute_crew,
    is_ready,
    kinds_of,
)
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
        begun: when this launch began, as `claims.server_time` tells it: what other launches gave
            up before is tried again.
        retries: how often a run that failed, or whose process died, is tried again, by all
            launches together.
        beat_s: seconds between two signs of life.
        silent_s: silence after which a worker of another machine counts as dead, in seconds.
        lockstep: which runs are done at once, with one pass for all.
    """

    plan: Plan
    job: Job
    out: Path
    begun: float
    retries: int = 2
    beat_s: float = BEAT_S
    silent_s: float = SILENT_S
    lockstep: LockstepMode = "never"

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
    kinds = kinds_of(sweep, left)
    with preemptible():
        while left:
            states: dict[str, State] = {}
            # No worker is to be left without work for the sake of a larger crew.
            size = min(CREW, len(left) // workers)
            for crew in crews(left, kinds, partial(is_ready, sweep), size=size):
                leave_if_told()
                states |= _attempt(sweep, crew, kinds.get(crew[0].name), listen)
                for run in crew:
                    state = states[run.name]
                    if state not in ("busy", "later"):
                        listen(state, run.name, _error(sweep, run) if state == "failed" else "")
            left = [run for run in left if states[run.name] in ("busy", "later")]
            if left and "done" not in states.values():
                time.sleep(_POLL_S)


def _attempt(
    sweep: Sweep, crew: Sequence[Run], alike: Alike | None, listen: Listen
) -> dict[str, State]:
    """Do runs at once, but for those done, failed for good, or that another process is at."""
    states: dict[str, State] = {}
    taken: list[tuple[Run, Claim]] = []
    with ExitStack() as holding:
        for run in crew:
            found = _take(sweep, run, holding)
            if isinstance(found, Claim):
                listen("begun", run.name, "")
                taken.append((run, found))
            else:
                states[run.name] = found
        return states | _execute(sweep, taken, alike)


def _take(sweep: Sweep, run: Run, holding: ExitStack) -> Claim | State:
    """Return a claim that is kept alive meanwhile, or why a run is not to be done now."""
    known = _known(sweep, run)
    if known:
        return known
    claim = take(sweep.folder(run), silent_s=sweep.silent_s)
    if claim is None:
        return "busy"
    holding.enter_context(held(claim, _lose, beat_s=sweep.beat_s))
    # Its last holder may have ended while this process looked.
    return _known(sweep, run) or claim


def _known(sweep: Sweep, run: Run) -> State | None:
    """Return what is known of a run without doing it; None if it is to be done now."""
    if sweep.is_done(run):
        return "found"
    failure = failure_of(sweep.folder(run), begun=sweep.begun)
    if failure is None:
        return None
    if failure.due is None:
        return "failed"
    return "later" if failure.due > time.time() else None


def _execute(
    sweep: Sweep, taken: Sequence[tuple[Run, Claim]], alike: Alike | None
) -> dict[str, State]:
    """Do runs that this process has taken."""
    states: dict[str, State] = {run.name: "failed" for run, _ in taken}
    runs = [run for run, claim in taken if not _given_up(sweep, run, claim.deaths(sweep.begun))]
    # A run must not end the sweep, whatever is wrong with it.
    try:
        if alike is not None and len(runs) > 1:
            errors = execute_crew(sweep, runs, alike)
        else:
            errors = [None] * len(runs)
            for run in runs:
                sweep.job.execute(sweep.plan.config(run), sweep.folder(run), run.steps)
    except Exception as error:
        errors = [error] * len(runs)
    return states | {
        run.name: _ended(sweep, run, error) for run, error in zip(runs, errors, strict=True)
    }


def _given_up(sweep: Sweep, run: Run, deaths: int) -> bool:
    """Return whether too many processes have died at a run, which is told then."""
    if deaths <= sweep.retries:
        return False
    Failure(
        attempts=deaths,
        error=f"Its process died {deaths} times: it was killed, or there was too little "
        "memory. Start again with fewer `jobs`.",
    ).write(sweep.folder(run))
    return True


def _ended(sweep: Sweep, run: Run, error: Exception | None) -> State:
    """Keep what went wrong, if anything did, and return what becomes of the run."""
    folder = sweep.folder(run)
    if error is None:
        forget(folder)
        return "done"
    before = failure_of(folder, begun=sweep.begun)
    failure = failure_after(error, before, retries=sweep.retries)
    failure.write(folder)
    return "failed" if failure.due is None else "later"


def _error(sweep: Sweep, run: Run) -> str:
    failure = failure_of(sweep.folder(run))
    return failure.error if failure else ""


def _lose() -> None:
    """Leave the run to whoever took it over, from the main thread."""
    _thread.interrupt_main()
