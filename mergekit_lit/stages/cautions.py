"""This file is what a reader should be told: of scores, and of experts that will merge badly.

Where something can be done, the line says what.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Expert, file_kind, load_expert
from mergekit_lit.core.params import norm, subtract
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.evaluation import Model, experts_of

UNEQUAL = 2.0
"""Largest ratio between experts that passes without a caution."""

_REPAIRS = {
    "delta norms": "Rescale them: --then equal_norms, or train the odd one again.",
    "travels": "Average them by it: --method travel_normalised, or train the odd one again.",
    "confidences": "Train the odd one again as the others were.",
}


def expert_cautions(files: Sequence[Path]) -> list[str]:
    """Return one line for each thing that makes experts merge badly, with what would mend it.

    Their cards alone are read: unequal norms and travels, and experts that went past what is good
    for their own task. Where an expert's training left an earlier checkpoint, it is named.

    Args:
        files: of experts; other weights than ours have no cards, and are passed over.

    Raises:
        FileNotFoundError: one is missing.
    """
    cards = {Path(f): load_expert(Path(f)).card for f in files if file_kind(Path(f)) == "expert"}
    travels = _known({file: card.travel for file, card in cards.items()})
    middle = statistics.median(travels.values()) if travels else None
    lengths = _known({file: card.displacement for file, card in cards.items()})
    lines = [
        *_unequal("delta norms", _by_task(lengths, cards)),
        *_unequal("travels", _by_task(travels, cards)),
    ]
    for file, card in cards.items():
        far = middle is not None and (card.travel or 0.0) > UNEQUAL * middle
        past = _is_past(card)
        if far or past:
            lines.append(_too_far(file, card, middle if far else None, past=past))
    return lines


def nearest_travel(travels: Mapping[int, float], wanted: float) -> int:
    """Return the step count whose travel is nearest to one that is wanted, by ratio.

    Args:
        travels: positive, by step count.
        wanted: positive.
    """
    return min(travels, key=lambda steps: (abs(math.log(travels[steps] / wanted)), steps))


def _known(values: Mapping[Path, float | None]) -> dict[Path, float]:
    return {file: value for file, value in values.items() if value}


def _by_task(values: Mapping[Path, float], cards: Mapping[Path, Card]) -> dict[str, float]:
    return {cards[file].task or file.stem: value for file, value in values.items()}


def _is_past(card: Card) -> bool:
    """Whether an expert's loss on its own task is above the base's: longer did it harm."""
    return None not in (card.val_loss, card.base_val_loss) and card.val_loss > card.base_val_loss  # type: ignore[operator] # known


def _too_far(file: Path, card: Card, middle: float | None, *, past: bool) -> str:
    """Return the line of an expert that went too far, and the checkpoint to take instead."""
    what = f"The expert of {card.task!r}"
    said = []
    if middle is not None:
        said.append(f"travelled {card.travel:.3g}, more than twice the others' {middle:.3g}")
    if past:
        said.append(
            f"has a validation loss of {card.val_loss:.3g}, above the base's "
            f"{card.base_val_loss:.3g}"
        )
    earlier = _earlier(file, card)
    if not earlier:
        return f"{what} {' and '.join(said)}. Train it again for fewer steps or at a lower rate."
    wanted = middle if middle is not None else min(earlier)
    chosen = earlier[min(earlier, key=lambda travel: abs(math.log(travel / wanted)))]
    return f"{what} {' and '.join(said)}. Merge its earlier checkpoint instead: {chosen}"


def _earlier(file: Path, card: Card) -> dict[float, Path]:
    """Return the checkpoints that the same training left before, by travel."""
    stem = file.stem.rpartition("-step")[0]
    found = {}
    for other in sorted(file.parent.glob(f"{stem}-step*.safetensors")) if stem else ():
        theirs = load_expert(other).card
        same = (theirs.task, theirs.lr, theirs.seed) == (card.task, card.lr, card.seed)
        if same and theirs.travel and (theirs.steps or 0) < (card.steps or 0):
            found[theirs.travel] = other
    return found


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
        *_unequal("delta norms", _delta_norms(experts, base)),
        *_unequal("confidences", _confidences(table, models)),
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


def _unequal(what: str, values: Mapping[str, float]) -> list[str]:
    """Measures of the experts that differ by more than a factor of two."""
    if len(values) < 2 or max(values.values()) <= UNEQUAL * min(values.values()):
        return []
    low, high = (pick(values, key=values.__getitem__) for pick in (min, max))
    return [
        f"The experts' {what} are unequal: {high!r} {values[high]:.3g}, {low!r} {values[low]:.3g}. "
        f"Methods that weigh experts alike then favour the larger. {_REPAIRS[what]}"
    ]


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
