"""This file fills in an expert's card from the run that made it."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

from mergekit_lit.core.cards import Card
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import Score


def expert_card(
    module: ExpertModule,
    *,
    trainer: Trainer,
    data: TaskData,
    train: Score,
    val: Score,
    measured: Mapping[str, float | None],
) -> Card:
    """Return the card of the expert as it stands after `trainer.global_step` steps.

    Args:
        module: the module that was trained.
        trainer: its Trainer, attached to the data module.
        data: what the module was trained on.
        train: loss and accuracy on the training images.
        val: loss and accuracy on the validation images.
        measured: path constants by the names of the card's fields.
    """
    optimization, tuning = module.optimization, module.finetuning
    lora, taught = tuning.kind == "lora", module.distillation
    is_sgd = optimization.optimizer == "sgd"
    horizon = trainer.max_steps if optimization.horizon_matters else None
    facts = {
        **_data_facts(data),
        "base": module.base.name,
        "base_hash": module.base.content,
        "backbone": module.base.backbone,
        "image_size": module.base.image_size,
        "optimizer": optimization.optimizer,
        "lr": optimization.lr,
        "momentum": optimization.momentum if is_sgd else None,
        "betas": None if is_sgd else optimization.betas,
        "weight_decay": optimization.weight_decay,
        "schedule": optimization.schedule,
        "warmup_steps": optimization.warmup(trainer.max_steps),
        "schedule_steps": horizon,
        "steps": trainer.global_step,
        "batch": module.data.batch * trainer.accumulate_grad_batches,
        "label_smoothing": tuning.label_smoothing,
        "clip_norm": _clip_norm(trainer),
        "precision": str(trainer.precision),
        "norm_statistics": tuning.norm_statistics,
        "finetuning": tuning.kind,
        "sam_radius": tuning.sam_radius,
        "lora_rank": tuning.lora_rank if lora else None,
        "lora_alpha": tuning.lora_alpha if lora else None,
        "teacher": taught.content if taught else None,
        "teacher_share": taught.share if taught else None,
        "temperature": taught.temperature if taught else None,
        "head": module.head_kind,
        "seed": module.seed,
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "val_loss": val.loss,
        "val_accuracy": val.accuracy,
    }
    # Of low-rank factors, path and gradients are not those of the weights that merging moves.
    return Card.from_json({**({} if lora else measured), **facts})


def _data_facts(data: TaskData) -> dict[str, str | int | None]:
    return {
        "task": data.name,
        "suite": data.suite,
        "classes": len(data.classes),
        "split_hash": data.split_hash,
        "n": len(data.train),
        "replaced": data.replaced,
        "neighbour_seed": data.neighbour_seed,
    }


def _clip_norm(trainer: Trainer) -> float | None:
    """Return the largest gradient norm; None without clipping, or where it clips by value."""
    largest = trainer.gradient_clip_val
    if not largest or trainer.gradient_clip_algorithm not in (None, "norm"):
        return None
    return float(largest)
