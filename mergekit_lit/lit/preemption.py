"""This file lets a process that is told to end do so at a good moment: at the end of a step.

SIGTERM is what a cluster, a container or a person sends before it kills; SIGUSR1 announces the end
of a job's time (`sbatch --signal`), and so does SIGUSR2, which submitit sends. Lightning has
handlers of its own, which several processes cannot rely on: each would broadcast from inside the
handler, in the middle of whatever the others exchange. Here they agree between two steps.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# EX_TEMPFAIL of sysexits.h, "try again": the time was over, and there was more to do. Whoever sends
# SIGTERM knows whether to start again; its code is 143, as shells count.
_AGAIN = 75


class _Watch:
    """What this process was told; signals are handled by the main thread alone."""

    active = False
    held = False
    told: int | None = None


@contextmanager
def preemptible(advice: str = "") -> Iterator[None]:
    """End the block where this process is told to: at once, or where `hold` says so, a bit later.

    The first signal counts; those that follow are ignored. Handlers of others, such as submitit's
    that queues the job again, are called when the block has been left. Inside another such block it
    only ends what `hold` began. Off the main thread nothing is watched.

    Args:
        advice: how to go on, added to the notes of the SystemExit that ends the block.

    Raises:
        SystemExit: the process was told to end; its code is 143 after SIGTERM and 75 after SIGUSR1
            or SIGUSR2, and its notes say what became of the work.
    """
    if current_thread() is not main_thread():
        yield
        return
    if _Watch.active:
        try:
            yield
        finally:
            _Watch.held = False
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # Who started this process may have it ignore a signal.
    mine = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    _Watch.active, _Watch.told = True, None
    for number in mine:
        signal.signal(number, _note)
    try:
        yield
        _Watch.held = False
        leave_if_told()
    except SystemExit as request:
        if advice and _Watch.told is not None:
            request.add_note(advice)
        raise
    finally:
        # What this block was told is nothing to the next: whoever caught its end may go on.
        told, _Watch.told = _Watch.told, None
        _Watch.active = _Watch.held = False
        for number in mine:
            signal.signal(number, before[number] or signal.SIG_DFL)
        handler = before.get(signal.Signals(told)) if told else None
        if callable(handler):
            handler(told or 0, None)


def hold() -> None:
    """Let signals wait, until the innermost `preemptible` block ends or `leave` is called."""
    _Watch.held = _Watch.active and current_thread() is main_thread()


def leave_if_told() -> None:
    """End the process here, if it was told to."""
    if _Watch.told is not None:
        leave(_Watch.told)


def leave(number: int, *notes: str, code: int | None = None) -> NoReturn:
    """End the process.

    Args:
        number: the signal that told it to.
        notes: sentences on what became of the work.
        code: exit code, if another than that of the signal.

    Raises:
        SystemExit: always.
    """
    request = SystemExit(exit_code(number) if code is None else code)
    for note in (f"Ended by {signal.Signals(number).name}.", *notes):
        request.add_note(note)
    raise request


def exit_code(number: int) -> int:
    """Return the exit code of a process that has left after a signal."""
    return _AGAIN if number in (signal.SIGUSR1, signal.SIGUSR2) else 128 + number


def told_anywhere(trainer: "Trainer") -> int | None:
    """Return the signal that any process of a training was told to end by; all return the same.

    Call it at the same place of the same step in each.
    """
    if trainer.world_size == 1:
        return _Watch.told
    mine = torch.tensor(float(_Watch.told or 0), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(mine, reduce_op="max")) or None


def exit_code_of(trainer: "Trainer") -> int | None:
    """Return the exit code of a process that leaves with others, if it is not the signal's.

    Lightning, where it started the other processes itself, kills the first of them when another
    has ended with any code but 0; only the first one's is seen by anybody.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if isinstance(environment, LightningEnvironment) and trainer.global_rank else None


def without_lightning(trainer: "Trainer") -> None:
    """Keep a Trainer from putting signal handlers of its own in the place of ours."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def _note(number: int, _: FrameType | None) -> None:
    if _Watch.told is not None:
        return
    _Watch.told = number
    if not _Watch.held:
        leave(number)
