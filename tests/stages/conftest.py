"""A callback that ends a run as a kill does."""

import pytest
from lightning.pytorch import Callback, Trainer


class _StopError(Exception):
    pass


class _StopAfter(Callback):
    """Ends a run in the middle of things."""

    error = _StopError

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture
def stop_after() -> type[_StopAfter]:
    """Makes a callback that raises its `error` after a step."""
    return _StopAfter
