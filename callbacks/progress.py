"""This file tells whoever watches how far a training run is."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Progress(Callback):
    """Calls a function with (steps done, steps in all, loss of the last batch) now and then.

    Reading the loss waits for the device, so it is read only when it is told.
    """

    def __init__(self, tell: Callable[[int, int, float | None], None], *, every: int = 5) -> None:
        """Choose who is told.

        Args:
            tell: called with the steps done, the number of steps, and the loss, None if unknown.
            every: steps between two calls, at least 1; the last step is always told.

        Raises:
            ValueError: `every` is below 1.
        """
        if every < 1:
            raise ValueError(f"`every` must be at least 1, but is {every!r}.")
        self.tell = tell
        self.every = every
        self._told = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Tell the step when it is due; once, however many micro-batches it has."""
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if not due or step == self._told or not trainer.is_global_zero:
            return
        self._told = step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else None
        self.tell(step, trainer.max_steps, value)
