"""This file is what weights and cards tell of experts that started from different bases."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.permutations import has_axes, permute
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.methods.alignment import git_rebasin, match_weights
from mergekit_lit.search.predicting.verdict import WAYS
from mergekit_lit.stages.opening import base_of
from mergekit_lit.theory.barrier import (
    distance,
    distances_to_mean,
    mean_stretch,
    second_order_cost,
)


@dataclass(frozen=True)
class Origins:
    """Experts, and where each of them started.

    Attributes:
        experts: in memory; their base is that of the first.
        bases: by content hash, in the order of the experts; None for one that is not at hand.
    """

    experts: Experts
    bases: Mapping[str, Base | None]

    def ways(self) -> dict[str, tuple[Experts, str]]:
        """Return each way to merge: the experts that go into it, and what merges them."""
        found = {"average": (self.experts, "average")}
        if self.aligned is not None:
            found |= {"git_rebasin": (self.aligned, "average"), "zipit": (self.experts, "zipit")}
        return {way: found[way] for way in WAYS if way in found}

    @cached_property
    def aligned(self) -> Experts | None:
        """The experts with units in the first one's order; None where units are unknown."""
        known = has_axes(self.experts.structure)
        return in_memory(git_rebasin(self.experts)) if known else None

    @cached_property
    def to_bases(self) -> list[float | None]:
        """How far each expert lies from its own base, measured, or else as its card tells."""
        experts, names = self.experts, self.experts.merged_names()
        bases = [self.bases.get(card.base_hash or "") for card in experts.cards]
        return [
            distance(base.params, tuned, names) if base is not None else card.displacement
            for base, tuned, card in zip(bases, experts.tuned, experts.cards, strict=True)
        ]

    def told(self) -> list[dict[str, Any]]:
        """Return the name of each base, its hash, whether it is at hand, and its experts."""
        names, cards = self.experts.names, self.experts.cards
        return [
            {
                "name": next(str(card.base) for card in cards if card.base_hash == content),
                "hash": content,
                "at_hand": base is not None,
                "experts": [
                    name
                    for name, card in zip(names, cards, strict=True)
                    if card.base_hash == content
                ],
            }
            for content, base in self.bases.items()
        ]

    def apart(self) -> list[dict[str, Any]]:
        """Return how far each base lies from the first, before and after alignment by weights."""
        known = [base for base in self.bases.values() if base is not None]
        names = self.experts.merged_names()
        travels = [d for d in self.to_bases if d is not None]
        travelled = statistics.fmean(travels) if travels else None
        return [
            {
                "left": known[0].name,
                "right": other.name,
                "distance": distance(known[0].params, other.params, names),
                "aligned": self._aligned_distance(known[0].params, other.params, names),
                "travelled": travelled,
            }
            for other in known[1:]
        ]

    def geometry(self, method: str) -> dict[str, Any]:
        """Return what weights and cards tell of one way to merge; of zipit they tell nothing."""
        given, merged_by = self.ways()[method]
        row: dict[str, Any] = {"stretch": None, "expected_cost": None}
        to_bases = [d for d in self.to_bases if d is not None]
        if merged_by != "average" or len(to_bases) < len(given):
            return row
        to_mean = distances_to_mean(given.tuned, given.merged_names())
        row["stretch"] = mean_stretch(to_mean, to_bases)
        costs = [
            second_order_cost(gain, to_mean=r, to_base=d)
            for gain, r, d in zip(map(_gained, given.cards), to_mean, to_bases, strict=True)
            if gain is not None and gain >= 0 and d
        ]
        if len(costs) == len(given):
            # Around a minimum no direction is known to rise at all.
            row["expected_cost"] = {"low": 0.0, "high": statistics.fmean(costs)}
        return row

    def chance(self) -> float | None:
        """Return what knowing nothing costs, ln C_t - F_t(theta_t) on validation images, mean."""
        costs = [
            math.log(len(head["weight"])) - card.val_loss
            for head, card in zip(self.experts.heads, self.experts.cards, strict=True)
            if head and card.val_loss is not None
        ]
        return statistics.fmean(costs) if len(costs) == len(self.experts) else None

    def _aligned_distance(self, left: Params, right: Params, names: Sequence[str]) -> float | None:
        structure = self.experts.structure
        if not has_axes(structure):
            return None
        return distance(
            left, permute(right, structure, match_weights(left, right, structure)), names
        )


def open_origins(files: Sequence[Path]) -> Origins:
    """Open experts with the bases that they started from, as far as these are at hand.

    Raises:
        FileNotFoundError: an expert is missing.
        ValueError: the first one's base cannot be loaded, or they cannot be merged.
    """
    first = base_of(files)
    experts = in_memory(load_experts(files, base=first, allow_different_base=True))
    bases: dict[str, Base | None] = {}
    for path, card in zip(files, experts.cards, strict=True):
        if card.base_hash is not None and card.base_hash not in bases:
            bases[card.base_hash] = _base_at_hand(path, card)
    return Origins(experts, bases)


def _base_at_hand(path: Path, card: Card) -> Base | None:
    """Return the base that a card names, if it is still what it was."""
    try:
        base = base_of([path])
    except (ValueError, KeyError, FileNotFoundError):
        return None
    return base if base.content == card.base_hash else None


def _gained(card: Card) -> float | None:
    """Return the loss on validation images that an expert's training gained, as its card tells."""
    if card.base_val_loss is None or card.val_loss is None:
        return None
    return card.base_val_loss - card.val_loss
