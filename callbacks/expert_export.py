"""This file writes experts while they are trained: one file with structure and card each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.callbacks.view import step_ended
from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.params import check_finite, with_prefix
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.core.twin_files import remove_twins, twin_path
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.card import expert_card
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.heads import Head
from mergekit_lit.lit.passes import score
from mergekit_lit.lit.recalibration import task_statistics


class ExpertExport(Callback):
    """Writes `<out>/<name>.safetensors` after the last step, or one file after each of `steps`.

    Where BatchNorm trained on batch statistics, its running statistics lag behind the weights: the
    file holds those of the final weights instead, estimated as for the head fit
    (`lit.recalibration.task_statistics`). The card's losses and accuracies are measured in eval
    mode with exactly what the file holds, its path constants come from every callback of the
    Trainer that has a method `card_facts()`. Twins to keep beside the expert, in `<name>.twins`,
    come from every one that has a method `neighbours()`; those of an older expert are removed in
    any case. List this callback after all these. The training is not disturbed: the same run gives
    the same bytes.
    """

    def __init__(self, out: Path, *, steps: Sequence[int] = (), name: str | None = None) -> None:
        """Choose where to write.

        Args:
            out: folder of the expert files.
            steps: step counts K after which an expert is written; empty for the last step alone.
            name: stem of the file; None for the task's name. Several `steps` add `-step<K>`.
        """
        self.out = Path(out)
        self.steps = tuple(steps)
        self.name = name

    def path(self, task: str, step: int) -> Path:
        """Return the file of the expert of `task` after `step` steps."""
        suffix = f"-step{step}" if len(self.steps) > 1 else ""
        return self.out / f"{self.name or task}{suffix}.safetensors"

    def path_after(self, trainer: Trainer, batch_idx: int) -> Path | None:
        """Return the file that is written after the micro-batch that just ended, if one is."""
        step = trainer.global_step
        asked = step in (self.steps or (trainer.max_steps,))
        if not (asked and step_ended(trainer, batch_idx)):
            return None
        return self.path(TaskDataModule.of(trainer).task, step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the expert after a step whose count was asked for."""
        if not isinstance(pl_module, ExpertModule):
            raise TypeError(
                f"ExpertExport must watch an ExpertModule, but got {type(pl_module).__name__}. "
                "Leave it out of `trainer.callbacks`."
            )
        path = self.path_after(trainer, batch_idx)
        if path is None:
            return
        if trainer.is_global_zero:
            expert = expert_of(
                pl_module, trainer, pl_module.data.task_data, measured=_measured(trainer)
            )
            # One that diverged is found before anything is written.
            twins = list(_twins(trainer))
            save_expert(path, expert)
            _save_twins(path, twins)
        trainer.strategy.barrier("ExpertExport")


def expert_of(
    module: ExpertModule,
    trainer: Trainer,
    data: TaskData,
    *,
    measured: Mapping[str, float | None] | None = None,
) -> Expert:
    """Return the expert as it stands: weights, fresh statistics, head and card.

    Args:
        module: the module that was trained.
        trainer: its Trainer.
        data: what it was trained on.
        measured: path constants by the names of the card's fields; None where nobody measured.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    told = f"expert {data.name!r} after {trainer.global_step} steps"
    params = floats({name: t.detach().clone() for name, t in module.tuned().items()})
    head = floats({name: t.detach().clone() for name, t in module.head.state_dict().items()})
    weights = with_prefix(params, "backbone.") | with_prefix(head, "head.")
    check_finite(weights, source=f"E{told[1:]}")
    plain = module.plain_backbone(params)
    if module.finetuning.norm_statistics == "train":
        params = {**params, **task_statistics(plain, data)}
        plain.load_state_dict(params)
    layer = Head(head, trained=False).to(module.device)
    train, val = (score(plain, layer, images) for images in (data.train, data.val))
    for split, found in (("train", train), ("val", val)):
        if found.loss is not None and not math.isfinite(found.loss):
            raise ValueError(
                f"The {split} loss of {told} must be finite, but is {found.loss}. Train again with "
                "a lower `lr`, more `warmup_steps` or `trainer.gradient_clip_val`."
            )
    card = expert_card(
        module, trainer=trainer, data=data, train=train, val=val, measured=measured or {}
    )
    return Expert(backbone=params, head=head, structure=module.structure, card=card)


def _measured(trainer: Trainer) -> dict[str, float | None]:
    """Return what the other callbacks know for the card."""
    facts: dict[str, float | None] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it untyped
        if hasattr(callback, "card_facts"):
            facts.update(callback.card_facts())
    return facts


def _twins(trainer: Trainer) -> Iterator[Expert]:
    """Yield the twins that the other callbacks carry, as experts."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # Lightning sets it untyped
        if hasattr(callback, "neighbours"):
            for module, data in callback.neighbours():
                yield expert_of(module, trainer, data)


def _save_twins(path: Path, twins: Sequence[Expert]) -> None:
    """Write the twins of an expert that was just written, in the place of older ones."""
    remove_twins(path)
    parent = file_hash(path) if twins else None
    for twin in twins:
        card = replace(twin.card, twin_of=parent)
        save_expert(
            twin_path(path, card.replaced or 0, card.neighbour_seed or 0), replace(twin, card=card)
        )
