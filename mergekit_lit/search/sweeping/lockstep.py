"""This file tells which runs of a sweep are done at once, and whether that was faster.

A crew is a few runs that differ in little but numbers, such as the learning rate; a worker takes
all of them together. Whether one pass for all beats one for each on the device at hand is measured
on the first crew of a kind, in its own steps, and kept in `lockstep/` of the sweep's folder for
those that follow. What failed before, or whose process died, is done alone.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from mergekit_lit.core.files import read_json, write_json
from mergekit_lit.lit.lockstep import Pace
from mergekit_lit.search.sweeping.failures import failure_of
from mergekit_lit.search.sweeping.jobs import Alike
from mergekit_lit.search.sweeping.plan import Run

if TYPE_CHECKING:
    from mergekit_lit.search.sweeping.worker import Sweep

LockstepMode: TypeAlias = Literal["auto", "always", "never"]
"""Where it may pay and was measured to; wherever it can be; nowhere."""

CREW = 8
"""Most runs that are done at once."""
_FOLDER = "lockstep"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found out about a kind of run on one kind of device.

    Attributes:
        device: name of the device.
        members: runs that were done at once.
        together: whether they go on so: one pass for all is faster, or was asked for.
        alone_s: seconds of a step of all, one pass each; None where that was not measured.
        together_s: the same of one pass for all.
        refusal: why one pass cannot serve them, if it cannot.
    """

    device: str
    members: int
    together: bool
    alone_s: float | None = None
    together_s: float | None = None
    refusal: str = ""

    def __str__(self) -> str:
        """Return the finding in a sentence."""
        if self.refusal:
            return f"Not in lockstep, but one by one: {self.refusal}"
        way = "In lockstep" if self.together else "Not in lockstep"
        if self.alone_s is None or self.together_s is None:
            return f"{way} on {self.device}, as asked."
        return (
            f"{way} on {self.device}: a step of {self.members} runs took "
            f"{1000 * self.together_s:.1f} ms, and {1000 * self.alone_s:.1f} ms one by one."
        )


def findings(out: Path) -> list[Finding]:
    """Return all that was found out in a sweep's folder."""
    found = [_read(path) for path in sorted((out / _FOLDER).glob("*.json"))]
    return [each for each in found if each is not None]


def kinds_of(sweep: "Sweep", runs: Sequence[Run]) -> dict[str, Alike]:
    """Return by name what agrees among runs that are worth a try in lockstep."""
    if sweep.lockstep == "never":
        return {}
    each = {run.name: sweep.job.alike(sweep.plan.config(run)) for run in runs}
    always = sweep.lockstep == "always"
    return {name: alike for name, alike in each.items() if always or alike.may_pay}


def obstacles(sweep: "Sweep") -> list[str]:
    """Return why runs that are worth a try can only be done alone, a sentence each."""
    found = dict.fromkeys(alike.obstacle for alike in kinds_of(sweep, sweep.plan.runs).values())
    return [f"Not in lockstep, but one by one: {why}." for why in found if why]


def is_ready(sweep: "Sweep", run: Run, alike: Alike) -> bool:
    """Return whether a run may be done at once with others: fresh, and of a kind that gains."""
    if alike.execute is None:
        return False
    known, folder = _read(_path(sweep.out, alike)), sweep.folder(run)
    if known and not known.together:
        return False
    return not (any(folder.glob("claim.*")) or failure_of(folder) or sweep.is_done(run))


def execute_crew(sweep: "Sweep", crew: Sequence[Run], alike: Alike) -> list[Exception | None]:
    """Do runs of one kind at once, and return the error of each that failed."""
    if alike.execute is None:
        raise ValueError(f"Runs of a crew must be alike, but {alike.obstacle}.")
    path = _path(sweep.out, alike)
    known = _read(path)
    together = known.together if known else sweep.lockstep == "always" or None
    pace = Pace(together=together, on_gpu=alike.on_gpu)
    tasks = [(sweep.plan.config(run), sweep.folder(run), run.steps) for run in crew]
    errors = alike.execute(tasks, pace)
    if pace.together is not None and (known is None or pace.refusal):
        finding = Finding(
            device=_device(alike),
            members=len(crew),
            together=pace.together,
            alone_s=median(pace.alone_s) if pace.alone_s else None,
            together_s=median(pace.together_s) if pace.together_s else None,
            refusal=pace.refusal,
        )
        write_json(path, asdict(finding))
    return errors


def crews(
    runs: Sequence[Run],
    kinds: Mapping[str, Alike],
    ready: Callable[[Run, Alike], bool],
    *,
    size: int,
) -> Iterator[list[Run]]:
    """Yield every run once: alone, or with others of its kind.

    Args:
        runs: in the order in which they are wanted.
        kinds: of those that can be done at once with others, by name.
        ready: whether a run may be done with others, asked when its crew is made.
        size: most runs of a crew.
    """
    queues: dict[str, deque[Run]] = {}
    for run in runs:
        if run.name in kinds:
            queues.setdefault(kinds[run.name].kind, deque()).append(run)
    taken: set[str] = set()
    for run in runs:
        if run.name in taken:
            continue
        crew = [run]
        if size > 1 and run.name in kinds and ready(run, kinds[run.name]):
            queue = queues[kinds[run.name].kind]
            found = (queue.popleft() for _ in range(len(queue)))
            free = (other for other in found if other.name not in {run.name, *taken})
            crew += islice((one for one in free if ready(one, kinds[one.name])), size - 1)
        taken.update(each.name for each in crew)
        yield crew


def _path(out: Path, alike: Alike) -> Path:
    text = f"{_device(alike)}\n{alike.kind}"
    return out / _FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _device(alike: Alike) -> str:
    return torch.cuda.get_device_name() if alike.on_gpu else "cpu"


def _read(path: Path) -> Finding | None:
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Finding(**read_json(path))
    return None
