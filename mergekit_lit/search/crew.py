"""This file runs one function on many items in a few processes, and hears from them meanwhile."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from threading import current_thread, main_thread
from types import TracebackType
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = tuple[Any, ...]

_LISTEN_S = 0.1


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
            with _deaf_to_interrupts():
                # The first piece of work starts every process.
                self._pool.submit(int)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if isinstance(error, KeyboardInterrupt):
            for child in set(active_children()) - set(self._strangers):
                child.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the result of `work` on each item, in the order of the items.

        The first error is raised as it came; work that has not begun is left.
        """
        if self._pool is None:
            return self._run_here(work, items)
        futures = [self._pool.submit(work, item) for item in items]
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


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Start processes that leave Ctrl-C to this one, which then ends them; even while they import.

    Signals are a matter of the main thread; elsewhere nothing is changed.
    """
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _join(queue: Any) -> None:
    """Make a new process a member of the crew: one thread, messages into the queue."""
    torch.set_num_threads(1)
    _Outlet.send = queue.put
