"""This file measures how well the base does a task before anything is tuned."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.heads import Head
from mergekit_lit.lit.passes import Score, score

_UNKNOWN = Score(None, None)


class BaseScore(Callback):
    """Score the base on the validation images under the head that it is tuned with, for the card.

    The base has the BatchNorm statistics that the head was fitted under. A trained head knows
    nothing at the start, so that there the base's score is unknown.
    """

    def __init__(self) -> None:
        self._score = _UNKNOWN

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score x0, unless the run goes on."""
        if trainer.global_step or not isinstance(pl_module, ExpertModule):
            return
        self._score = _UNKNOWN
        if pl_module.head_kind != "trained" and trainer.is_global_zero:
            # In float32, as the expert's file holds them, whatever the precision of training.
            base = pl_module.plain_backbone(floats(pl_module.tuned()))
            head = Head(floats(pl_module.head.state_dict()), trained=False).to(pl_module.device)
            self._score = score(base, head, pl_module.data.task_data.val)

    def card_facts(self) -> dict[str, float | None]:
        """Return the base's loss and accuracy; None where they are unknown."""
        return {"base_val_loss": self._score.loss, "base_val_accuracy": self._score.accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Return the score."""
        return {"loss": self._score.loss, "accuracy": self._score.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._score = Score(state_dict["loss"], state_dict["accuracy"])
