"""This file runs one function on many items in a few processes, and hears from them meanwhile."""

import atexit
import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = tuple[Any, ...]

_LISTEN_S = 0.1
# What a worker that is told to leave has to come to the end of a step and keep it: somebody waits
# after Ctrl-C or an error; a cluster gives about two minutes.
_LEAVE_S, _SAVE_S = 10.0, 100.0
# The exit code of a process that SIGTERM ended, as shells count it.
_ENDED = 143


class _Outlet:
    """Where the messages of this process go: nowhere, a queue, or straight to the listener."""

    send: Callable[[Message], None] | None = None


def tell(*message: Any) -> None:
    """Send a message to whoever started this work; silent where nobody listens."""
    if _Outlet.send is not None:
        _Outlet.send(message)


class Crew:
    """A few worker processes of one thread each, started once and used for several stages.

    With one job the work runs in this process, so that it can be debugged and needs no start-up.
    Ctrl-C and errors end the workers, in the middle of their work but not of a file or, where
    checkpoints are made, of a step; so does the death of this process.
    """

    def __init__(self, jobs: int, *, listen: Callable[[Message], None] | None = None) -> None:
        """Choose the size of the crew; nothing is started yet.

        Args:
            jobs: number of processes, at least 1.
            listen: called in this process with every message that `tell` sends.

        Raises:
            ValueError: `jobs` is below 1.
        """
        if jobs < 1:
            raise ValueError(f"`jobs` must be at least 1, but is {jobs!r}.")
        self._jobs = jobs
        self._listen = listen or (lambda _: None)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        if self._jobs > 1:
            context = get_context("spawn")
            self._queue = context.SimpleQueue()
            self._strangers = active_children()
            self._pool = ProcessPoolExecutor(
                self._jobs, mp_context=context, initializer=_join, initargs=(self._queue,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            end_processes(set(active_children()) - set(self._strangers), because=error)
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the result of `work` on each item, in the order of the items.

        The first error is raised as it came; work that has not begun is left.

        Raises:
            ChildProcessError: a worker was killed.
        """
        if self._pool is None:
            return self._run_here(work, items)
        try:
            return self._run_apart(self._pool, work, items)
        except BrokenProcessPool:
            raise ChildProcessError(
                "Worker processes must live until their work is done, but one ended before: it was "
                "killed, or there was too little memory. Start again with fewer `jobs`."
            ) from None

    def _run_apart(
        self, pool: ProcessPoolExecutor, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Result]:
        with interrupts_held():
            # The pool starts its processes as work comes in.
            futures = [pool.submit(_work, work, item) for item in items]
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_LISTEN_S, return_when=FIRST_COMPLETED)
            self._hear()
            for future in done:
                future.result()
        self._hear()
        return [future.result() for future in futures]

    def _run_here(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        before, _Outlet.send = _Outlet.send, self._listen
        try:
            return [work(item) for item in items]
        finally:
            _Outlet.send = before

    def _hear(self) -> None:
        while not self._queue.empty():
            self._listen(self._queue.get())


def end_processes(processes: Iterable[BaseProcess], *, because: BaseException) -> None:
    """Tell processes to leave, and kill those that have not after a while.

    Args:
        processes: workers.
        because: why this process ends; a SystemExit where it was told to by a signal.
    """
    workers = list(processes)
    for worker in workers:
        worker.terminate()
    latest = monotonic() + (_SAVE_S if isinstance(because, SystemExit) else _LEAVE_S)
    for worker in workers:
        worker.join(max(0.0, latest - monotonic()))
        worker.kill()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Start processes that leave Ctrl-C to this one, even while they import; it is not lost here.

    What is blocked stays blocked in the processes that are started meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_worker() -> None:
    """Make this process a worker: of one thread, and of no longer life than its parent."""
    torch.set_num_threads(1)
    # The last search for garbage among all of torch takes seconds.
    atexit.register(gc.freeze)
    signal.signal(signal.SIGTERM, leave)
    Thread(target=_leave_after_parent, daemon=True).start()


def _join(queue: Any) -> None:
    """Make a new process a member of the crew: messages go into the queue."""
    become_worker()
    _Outlet.send = queue.put


def _work(work: Callable[[Item], Result], item: Item) -> Result:
    """Return the result of one piece of work; end the process if it is told to leave meanwhile."""
    try:
        return work(item)
    except SystemExit:
        # The pool would take it for a result, and go on with the next piece.
        os._exit(_ENDED)


def leave(*_: Any) -> None:
    """Leave from wherever the process is: files that are being written are removed on the way."""
    raise SystemExit(_ENDED)


def _leave_after_parent() -> None:
    """Leave when the process that started this one has died: nobody else would end it."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
