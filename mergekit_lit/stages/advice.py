"""This file is what a reader should be told of experts before they are merged, and what mends it.

Cards alone are read, so that merging imports no network for it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import file_kind, load_expert
from mergekit_lit.stages.opening import several_bases

UNEQUAL = 2.0
"""Largest ratio between experts that passes without a caution."""

_TOLD_BY = ("travel", "displacement", "val_loss")
"""What on a card these cautions rest on."""

_REPAIRS = {
    # To their mean, the veneer's default, short ones are made too long to bear.
    "delta norms": "An average bears that; for `ties` rescale them to the shortest, --then "
    "'{name: equal_norms, config: {to: min}}', or train the odd one again.",
    "travels": "An average weighs them alike with --method travel_normalised; or train the odd one "
    "again.",
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
    lengths = _known({file: card.displacement for file, card in cards.items()})
    lines = [
        *unequal("delta norms", _by_task(lengths, cards)),
        *unequal("travels", _by_task(travels, cards)),
    ]
    for file, card in cards.items():
        others = [travel for other, travel in travels.items() if other != file]
        middle = statistics.median(others) if others else None
        far = middle is not None and (card.travel or 0.0) > UNEQUAL * middle
        past = _is_past(card)
        if far or past:
            lines.append(_too_far(file, card, middle if far else None, past=past))
    return lines


def merge_cautions(facts: Mapping[str, Any]) -> list[str]:
    """Return one line if a method gave every delta the coefficient 0.

    Args:
        facts: of the merge, as its record holds them.
    """
    rows = [facts.get("coefficients") or [], *(facts.get("coefficients_by_tensor") or {}).values()]
    known = [coefficient for row in rows for coefficient in row]
    if not known or any(known):
        return []
    return [
        "All coefficients are 0: no step was found that is better than the base, and the merge is "
        "that. Ask for a fixed travel or scale, or merge by another method."
    ]


def base_cautions(files: Sequence[Path]) -> list[str]:
    """Return a line where the cards name several bases, with what tells whether to merge at all.

    Args:
        files: of experts; others than ours are passed over.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: they are of several architectures.
    """
    if not several_bases(files):
        return []
    named = " ".join(str(file) for file in files)
    return [
        "The experts are of several bases, whose units need not match. What merging them "
        f"costs, and whether to: mergekit-lit predict {named}"
    ]


def uncarded(files: Sequence[Path]) -> list[str]:
    """Return a line for each expert of which too little is known for any of these cautions.

    Args:
        files: of experts, or weights of others.

    Raises:
        FileNotFoundError: one is missing.
    """
    lines = []
    for file in map(Path, files):
        card = load_expert(file).card if file_kind(file) == "expert" else None
        if card is None:
            lines.append(f"{str(file)!r} has no card: nothing is known of how it was trained.")
            continue
        unknown = [name for name in _TOLD_BY if getattr(card, name) is None]
        if unknown:
            lines.append(
                f"The card of {str(file)!r} does not tell {', '.join(unknown)}: whether it went "
                "further than the others cannot be said."
            )
    return lines


def unequal(what: str, values: Mapping[str, float]) -> list[str]:
    """Measures of the experts that differ by more than a factor of two."""
    if len(values) < 2 or max(values.values()) <= UNEQUAL * min(values.values()):
        return []
    low, high = (pick(values, key=values.__getitem__) for pick in (min, max))
    return [
        f"The experts' {what} are unequal: {high!r} {values[high]:.3g}, {low!r} {values[low]:.3g}. "
        f"Methods that weigh experts alike then favour the larger. {_REPAIRS[what]}"
    ]


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
        again = "Train it again for fewer steps or at a lower rate"
        # Whose answers are worse than the base's is no teacher.
        taught = "" if past else _taught(file, card)
        return f"{what} {' and '.join(said)}. {again}{taught}."
    wanted = middle if middle is not None else min(earlier)
    chosen = earlier[min(earlier, key=lambda travel: abs(math.log(travel / wanted)))]
    return f"{what} {' and '.join(said)}. Merge its earlier checkpoint instead: {chosen}"


def _taught(file: Path, card: Card) -> str:
    """Return how to train a student of an expert that is good, but went too far."""
    return (
        f", or distil it so: mergekit-lit train --data.suite {card.suite} --data.task {card.task} "
        f"--model.teacher {file} --steps K --out FOLDER"
    )


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
