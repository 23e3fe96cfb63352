"""This file opens the loggers of a training, and tells them what it was and how it ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from mergekit_lit.core.experts import Base
from mergekit_lit.lit.card import expert_card
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.loggers import log_failure, log_outcome, make_loggers
from mergekit_lit.lit.passes import Score
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, RunFacts, base_model, file_model
from mergekit_lit.stages.run_groups import facts_of_run

_UNKNOWN = Score(None, None)


class TrainingLog(Callback):
    """Makes the loggers when training really starts, so that a refused run leaves no W&B run.

    Lightning opens the loggers that a Trainer is made with before data and head are looked at.
    """

    def __init__(
        self, kind: LoggerKind, logs: Path, *, config: Mapping[str, Any], resume: bool
    ) -> None:
        """Open nothing yet.

        Args:
            kind: which loggers.
            logs: `logs/<name>` of the run's folder.
            config: what decides the weights' path.
            resume: whether a run with these settings goes on.
        """
        self._kind, self._logs = kind, logs
        self._config, self._resume = config, resume

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the loggers to the Trainer."""
        if not isinstance(pl_module, ExpertModule):
            raise TypeError(f"TrainingLog must watch an ExpertModule, not {type(pl_module)}.")
        facts = self._facts(trainer, pl_module)
        trainer.loggers = make_loggers(
            self._kind, self._logs, facts, resume=self._resume, step=trainer.global_step
        )

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002 (Lightning's signature)
        exception: BaseException,
    ) -> None:
        """Tell the loggers that the run failed, or was stopped."""
        log_failure(trainer.loggers, exception)

    def _facts(self, trainer: Trainer, module: ExpertModule) -> RunFacts:
        """Return what is known of the expert before it is trained: its card without results."""
        data = TaskDataModule.of(trainer)
        card = expert_card(
            module, trainer=trainer, data=data.task_data, train=_UNKNOWN, val=_UNKNOWN, measured={}
        ).to_json()
        known = {key: value for key, value in card.items() if value is not None}
        return facts_of_run(
            "train",
            self._logs.name,
            self._logs.parent.parent,
            tags=[Path(data.suite).name, module.base.name],
            config={**self._config, **known, "steps": trainer.max_steps},
        )


def log_experts(
    loggers: Sequence[Logger], base: Base, cards: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Tell the loggers the experts that came of a training, by the card of each.

    Args:
        loggers: of the Trainer.
        base: that they were trained from.
        cards: card of each expert, in the order of their steps.
    """
    card = list(cards.values())[-1]
    outcome = Outcome(
        summary=card,
        config=card,
        tables={"experts": [{"expert": path.stem, **card} for path, card in cards.items()]},
        used=[base_model(base)],
        made=[file_model(path, "expert", card) for path, card in cards.items()],
    )
    log_outcome(loggers, outcome)
