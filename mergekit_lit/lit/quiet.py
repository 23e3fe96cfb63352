"""This file keeps back what Lightning says, and does at Ctrl-C, that helps nobody here."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_ACTIONABLE = (
    # Images are held in memory as uint8: there are no workers to add.
    ".*does not have many workers.*",
    # A task with few images has a batch for some processes only, which is as it should be.
    ".*local rank has zero length.*",
    # lightning 2.6 with torch >= 2.13: its pytree shim uses a deprecated isinstance check.
    ".*LeafSpec.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's tips and notes, and the warnings above, inside the block."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOT_ACTIONABLE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C through a Trainer, which turns it into an exit of the process with code 1.

    Raises:
        KeyboardInterrupt: it was pressed; the Trainer has put its things away.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as request:
        if not isinstance(request.__context__, KeyboardInterrupt):
            raise
        # Lightning leaves it ignored.
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
