"""This file tells what is left of a sweep, and what that will cost, from what was measured.

The seconds of a run are those of a start and of its steps, `start + K step`. What is finished tells
them; before the first run, a trial of a few steps does.
"""

import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.search.sweeping.jobs import Cost
from mergekit_lit.search.sweeping.plan import Run
from mergekit_lit.search.sweeping.worker import Sweep

# Trials of further networks and batches would keep people waiting.
_TRIALS = 3
# Records beyond so many tell nothing new of the mean.
_FINISHED = 50
_HOUR = 3600.0


@dataclass(frozen=True)
class Estimate:
    """What a sweep holds, and what is left to do.

    Attributes:
        runs: number of runs.
        results: experts or models that they make.
        shared: runs that leave several experts of one trajectory.
        left: runs that are not done yet.
        core_hours: of one thread each, to do them; None where nothing is known.
        gpu_hours: the same of GPUs, if runs use one.
        disk_mb: that they will take; None where nothing is known.
        source: what was measured.
    """

    runs: int
    results: int
    shared: int
    left: int
    core_hours: float | None
    gpu_hours: float | None
    disk_mb: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return asdict(self)


def estimate(sweep: Sweep) -> Estimate:
    """Return what is left of a sweep, and what that will cost.

    Nothing is written to the sweep's folder.
    """
    plan = sweep.plan
    left: list[Run] = []
    finished: list[Run] = []
    for run in plan.runs:
        (finished if sweep.is_done(run) else left).append(run)
    found = _of_finished(sweep, finished[:_FINISHED])
    source = "what is finished"
    if not finished:
        found = _of_trials(sweep, left)
        source = "trials of a few steps" if found else "nothing measured yet"
    # A run like none that was measured costs what those did on average.
    costs = [found.get(_kind(sweep, run)) or _mean(list(found.values())) for run in left]
    known = [(run, cost) for run, cost in zip(left, costs, strict=True) if cost]
    seconds = sum(cost.start_s + cost.step_s * max(run.steps, default=0) for run, cost in known)
    size = sum(cost.result_bytes * run.results for run, cost in known)
    told = bool(found) or not left
    return Estimate(
        runs=len(plan.runs),
        results=plan.results,
        shared=plan.shared,
        left=len(left),
        core_hours=seconds / _HOUR if told else None,
        gpu_hours=seconds / _HOUR if any(cost.on_gpu for _, cost in known) else 0.0,
        disk_mb=size / 1e6 if told else None,
        source=source,
    )


def _of_finished(sweep: Sweep, runs: Sequence[Run]) -> dict[Hashable, Cost]:
    """Return what finished runs cost, by what decides it."""
    groups: dict[Hashable, list[Cost]] = {}
    for run in runs:
        folder = sweep.folder(run)
        records = filter(None, map(Record.find, folder.glob("*.record.json")))
        on_gpu = sweep.job.on_gpu(sweep.plan.config(run))
        # A GPU is held while the processor waits for it.
        seconds = sum(
            record.seconds if on_gpu else record.cpu_seconds or record.seconds for record in records
        )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        steps = max(run.steps, default=0)
        cost = Cost(
            start_s=0.0 if steps else seconds,
            step_s=seconds / steps if steps else 0.0,
            result_bytes=size / run.results,
            on_gpu=on_gpu,
        )
        groups.setdefault(_kind(sweep, run), []).append(cost)
    return {kind: _mean(costs) for kind, costs in groups.items()}  # type: ignore[misc] # not empty


def _of_trials(sweep: Sweep, runs: Sequence[Run]) -> dict[Hashable, Cost]:
    """Return what short runs of a few kinds cost, by kind."""
    found: dict[Hashable, Cost] = {}
    for run in runs:
        kind = _kind(sweep, run)
        if kind in found or len(found) == _TRIALS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cost = sweep.job.trial(sweep.plan.config(run), Path(folder))
        if cost is None:
            break
        found[kind] = cost
    return found


def _kind(sweep: Sweep, run: Run) -> Hashable:
    return sweep.job.cost_kind(sweep.plan.config(run))


def _mean(costs: Sequence[Cost]) -> Cost | None:
    if not costs:
        return None
    return Cost(
        start_s=fmean(cost.start_s for cost in costs),
        step_s=fmean(cost.step_s for cost in costs),
        result_bytes=fmean(cost.result_bytes for cost in costs),
        on_gpu=any(cost.on_gpu for cost in costs),
    )
