"""This file runs a sweep on this machine: warm worker processes, each on cores or a GPU of its own.

A worker is one process of one thread that imports once and keeps what it has loaded; two threads
that share busy cores were seen to be 20 times slower. One that is killed is started again, and
another goes on with its run meanwhile.
"""

import os
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from mergekit_lit.core.threads import one_thread
from mergekit_lit.search.crew import become_worker, end_processes, interrupts_held
from mergekit_lit.search.sweeping.worker import Listen, Sweep, work

_GPUS = "CUDA_VISIBLE_DEVICES"


def run_local(sweep: Sweep, listen: Listen, *, jobs: int) -> None:
    """Run a sweep in worker processes of this machine; with one job in this process.

    Args:
        sweep: what to do.
        listen: is told of each run, in this process.
        jobs: number of workers, at least 1.

    Raises:
        ChildProcessError: workers die, one after another, and no run comes to its end.
    """
    if jobs == 1:
        # As workers do, so that results do not depend on their number.
        with one_thread():
            work(sweep, listen)
        return
    crew = _Workers(sweep, listen, jobs)
    try:
        crew.run()
    except BaseException as reason:
        end_processes(crew.processes(), because=reason)
        raise


class _Workers:
    """Worker processes, each with a pipe of its own: a lock in common could die with its holder."""

    def __init__(self, sweep: Sweep, listen: Listen, jobs: int) -> None:
        self._sweep, self._listen, self._jobs = sweep, listen, jobs
        self._context = get_context("spawn")
        self._at: dict[Connection, tuple[int, BaseProcess]] = {}
        self._deaths = 0

    def processes(self) -> list[BaseProcess]:
        """Return the processes that run."""
        return [process for _, process in self._at.values()]

    def run(self) -> None:
        """Start the workers, hear them out, and start those again that are killed."""
        for place in range(self._jobs):
            self._start(place)
        while self._at:
            for pipe in wait(list(self._at)):
                self._hear(pipe)  # type: ignore[arg-type] # only pipes are waited for

    def _start(self, place: int) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_worker, args=(self._sweep, theirs, place, self._jobs), name=f"worker {place}"
        )
        with interrupts_held():
            process.start()
        # So that the pipe ends when the worker does.
        theirs.close()
        self._at[ours] = (place, process)

    def _hear(self, pipe: Connection) -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._ended(pipe)
            return
        if message[0] in ("done", "failed"):
            self._deaths = 0
        self._listen(*message)

    def _ended(self, pipe: Connection) -> None:
        place, process = self._at.pop(pipe)
        pipe.close()
        process.join()
        if process.exitcode == 0:
            return
        self._deaths += 1
        # A run that kills its process is given up before.
        if self._deaths > (self._sweep.retries + 2) * self._jobs:
            raise ChildProcessError(
                f"Worker processes must live, but {self._deaths} ended before one of them came to "
                f"the end of a run, the last with exit code {process.exitcode}. Their words are "
                "above."
            )
        self._start(place)


def _worker(sweep: Sweep, pipe: Connection, place: int, workers: int) -> None:
    """Be one worker process."""
    become_worker()
    _pin(place, workers)
    work(sweep, lambda *message: pipe.send(message), place=place, workers=workers)


def _pin(place: int, workers: int) -> None:
    """Keep this process to its share of the cores, and to one of the GPUs that it may use.

    With as many workers as cores that is a core of its own. With fewer the cores are shared out, so
    that two launches on one machine do not both crowd on the first of them.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if workers <= len(cores):
            os.sched_setaffinity(0, cores[place::workers])
    gpus = [gpu for gpu in os.environ.get(_GPUS, "").split(",") if gpu] or _all_gpus()
    if gpus:
        # Read when CUDA is first used, which is later.
        os.environ[_GPUS] = gpus[place % len(gpus)]


def _all_gpus() -> list[str]:
    """Return the GPUs of this machine; none where they are hidden from this process."""
    if _GPUS in os.environ:
        return []
    return [str(gpu) for gpu in range(torch.cuda.device_count())]
