"""This file is what the bound takes of real experts: facts from cards, images and twins."""

from collections.abc import Mapping
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.lit.recalibration import declared_splits
from mergekit_lit.models.statistics import has_statistics
from mergekit_lit.stages.constants import Measured
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts, effective_travel


def expert_facts(
    card: Card, name: str, measured: Measured | None, twins: Mapping[str, Any] | None
) -> ExpertFacts:
    """Return what the bound takes of one expert, from its card, images and twins."""
    plain = (
        card.optimizer == "sgd"
        and not card.momentum
        and card.schedule == "constant"
        and not card.warmup_steps
    )
    known = plain and card.lr is not None and card.steps is not None
    eps2, eps2_head = _stability(card, twins)
    m = counted(twins)
    replaced = (twins or {}).get("replaced", {})
    return ExpertFacts(
        travel=effective_travel(card),
        travel_squared=card.travel_squared,
        plain_sgd=(card.lr, card.steps) if known else None,  # type: ignore[arg-type] # known
        d2=card.mean_squared_displacement,
        batch=card.batch,
        noise=card.gradient_noise,
        zeta2=measured.base.zeta2[name].value if measured else None,
        eps2=eps2,
        eps2_path=None if card.eps_path is None else card.eps_path**2,
        eps2_head=eps2_head,
        chaotic=bool(replaced) and m is None,
        unchecked=m is not None and replaced[str(m)]["above_rounding"] is None,
        base_loss=measured.base.losses[name] if measured else None,
        train_loss=measured.train[name]["loss"] if measured else None,
        slope=measured.base.slopes[name].value if measured else None,
        merged_gradient2=measured.merged.own_gradient2[name].value if measured else None,
        lr=card.lr,
        adaptive=card.optimizer not in (None, "sgd"),
        clipped=card.clip_norm is not None,
        trained_head=card.head == "trained",
        own_objective=_own_objective(card),
    )


def _own_objective(card: Card) -> str:
    """Return what an expert's training was of, beside the cross-entropy as a function of x."""
    parts = (
        (card.weight_decay, f"weight decay {card.weight_decay}"),
        (card.label_smoothing, f"label smoothing {card.label_smoothing}"),
        (card.sam_radius, f"the sharpest point within {card.sam_radius}"),
        (card.teacher_share, f"a teacher's answers, {card.teacher_share} of the loss"),
        (card.finetuning == "linearised", "the tangent model"),
        (card.finetuning == "lora", "factors of low rank"),
    )
    return ", ".join(name for there, name in parts if there)


def counted(twins: Mapping[str, Any] | None) -> int | None:
    """Return the smallest m whose twins are not known to be within the rounding, if there is one.

    Args:
        twins: what `StabilityTwins` left for an expert, or None.
    """
    replaced = (twins or {}).get("replaced", {})
    far = [int(m) for m, found in replaced.items() if found["above_rounding"] is not False]
    return min(far, default=None)


def _stability(card: Card, twins: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Return eps^2 of backbone and head where twins measured them above the rounding."""
    m = counted(twins)
    if twins is None or m is None:
        return None, None if card.head in (None, "trained") else 0.0
    found = twins["replaced"][str(m)]
    return found["backbone"]["mean"], found["head"]["mean"]


def merge_facts(measured: Measured | None) -> MergeFacts:
    """Return what the bound takes of a merge and the loss, from images; all unknown without."""
    if measured is None:
        return MergeFacts()
    return MergeFacts(
        smoothness=measured.smoothness.secant.value,
        gram=measured.base.gram,
        merged_gradient2=measured.merged.gradient2.value,
        sample_gradient2=measured.sample_gradient2.value,
        step2=measured.step2,
    )


def looks_at(recipe: Recipe, merged: Merged) -> str:
    """Return what method and veneers take beside the experts' tensors, as `MergeFacts` has it."""
    if declared_splits(recipe.method, recipe.veneers):
        return "images"
    return "cards" if merged.facts["data"] == "cards" else ""


def is_recalibrated(recipe: Recipe, experts: Experts) -> bool:
    """Return whether BatchNorm statistics of the merge are estimated on training images."""
    return recipe.batch_norm.startswith("recalibrate") and has_statistics(experts.structure)
