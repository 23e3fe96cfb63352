"""This file is what a reader of scores should be told: weak experts, unlike experts, odd splits."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.params import norm, subtract
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.evaluation import Model, experts_of
from mergekit_lit.stages.advice import unequal


def cautions(
    table: Mapping[str, Any],
    models: Mapping[str, Model],
    data: Sequence[TaskData],
    *,
    split: str,
) -> list[str]:
    """Return one line for each thing that may mislead a reader of the scores.

    Args:
        table: scores by model (`lit.scores.score_table`).
        models: the models by name.
        data: the tasks evaluated.
        split: which images were used.
    """
    experts = experts_of(models)
    bases = {name: model for name, model in models.items() if isinstance(model, Base)}
    base = next(iter(bases.values()), None)
    return [
        *_not_finite(table),
        *_below_base(table, models, bases),
        *unequal("delta norms", _delta_norms(experts, base)),
        *unequal("confidences", _confidences(table, models)),
        *_other_base(experts, base),
        *_trained_heads(experts, base),
        *_repeated_tasks(experts),
        *(_other_split(experts, data) if split != "test" else []),
    ]


def _not_finite(table: Mapping[str, Any]) -> list[str]:
    """Models that overflow: their accuracy is of the images that are left."""
    lines = []
    for name, told in table.items():
        lost = {task: row["not_finite"] for task, row in told["tasks"].items() if row["not_finite"]}
        if lost:
            total = sum(told["tasks"][task]["n"] for task in lost)
            tasks = ", ".join(repr(task) for task in lost)
            lines.append(
                f"{name!r} has logits that are not finite on {sum(lost.values())} of {total} "
                f"images of {tasks}: they count as wrong, and its loss there is unknown. Merge "
                "with a smaller scale, or look for damaged inputs."
            )
    return lines


def _below_base(
    table: Mapping[str, Any], models: Mapping[str, Model], bases: Mapping[str, Base]
) -> list[str]:
    """Experts that do worse than a base on their own task: training harmed them."""
    lines = []
    for name in table:
        for base in bases if experts_of({name: models[name]}) else ():
            for task, row in table[name]["tasks"].items():
                before = table[base]["tasks"][task]["accuracy"]
                if row["accuracy"] < before:
                    lines.append(
                        f"The expert of {task!r} is below the base on its own task: "
                        f"{row['accuracy']:.3f} < {before:.3f}. Train it again at another rate."
                    )
    return lines


def _delta_norms(experts: Sequence[Expert], base: Base | None) -> dict[str, float]:
    """Return ||tau_t|| over the merged tensors by expert; from the cards where no base is given."""
    if base is None:
        told = {expert.name: expert.card.displacement for expert in experts}
        return {name: value for name, value in told.items() if value is not None}
    merged = {name for name, info in base.structure.items() if info.is_merged}
    start = {name: tensor for name, tensor in base.params.items() if name in merged}
    return {expert.name: norm(subtract(start, expert.backbone)) for expert in experts}


def _confidences(table: Mapping[str, Any], models: Mapping[str, Model]) -> dict[str, float]:
    """Return each expert's mean confidence on its own task, where it is known."""
    return {
        task: row["confidence"]
        for name in table
        if experts_of({name: models[name]})
        for task, row in table[name]["tasks"].items()
        if row["confidence"] is not None
    }


def _other_base(experts: Sequence[Expert], base: Base | None) -> list[str]:
    """Experts that started elsewhere than the base evaluated beside them."""
    if base is None:
        return []
    strange = [e.name for e in experts if e.card.base_hash not in (None, base.content)]
    if not strange:
        return []
    return [
        f"{len(strange)} experts, first {strange[0]!r}, started from another base than "
        f"{base.name!r}: their heads were not made for it."
    ]


def _trained_heads(experts: Sequence[Expert], base: Base | None) -> list[str]:
    """A trained head was fitted to the expert's features, so the base is scored unfairly low."""
    trained = [expert.name for expert in experts if expert.card.head == "trained"]
    if base is None or not trained:
        return []
    return [
        f"The base is scored with heads that were trained with their experts ({len(trained)} "
        f"tasks, first {trained[0]!r}): its accuracy says little. Frozen heads are fair."
    ]


def _repeated_tasks(experts: Sequence[Expert]) -> list[str]:
    """Several experts of one task: which one accuracies are normalised by is arbitrary."""
    names = [expert.name for expert in experts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not repeated:
        return []
    return [
        f"{len(repeated)} tasks, first {repeated[0]!r}, have several experts: normalised accuracy "
        "and the base's head use the last one given."
    ]


def _other_split(experts: Sequence[Expert], data: Sequence[TaskData]) -> list[str]:
    """Train or val images that may have been the expert's training images, or not."""
    hashes = {task.name: task.split_hash for task in data}
    strange = [
        expert.name
        for expert in experts
        if expert.card.split_hash is not None
        and hashes.get(expert.name, expert.card.split_hash) != expert.card.split_hash
    ]
    if not strange:
        return []
    return [
        f"{len(strange)} experts, first {strange[0]!r}, were trained on another split: these train "
        "and val images are not theirs. Give the split options of their training."
    ]
