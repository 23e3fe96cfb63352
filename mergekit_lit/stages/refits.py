"""This file is the stability of any merge: what merging refits in place of experts changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.params import Params
from mergekit_lit.core.twin_files import twin_files, twins_folder
from mergekit_lit.lit.recalibration import ImagesBySplit
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.stages.bound_facts import counted
from mergekit_lit.stages.recipes import Recipe, merge_recipe
from mergekit_lit.theory.norms import squared_norm


@dataclass(frozen=True)
class Refit:
    """An expert trained again with a few samples replaced, as `StabilityTwins` exports it.

    Attributes:
        replaced: m, samples replaced.
        backbone: its tensors.
    """

    replaced: int
    backbone: Params


def refits_of(expert: Path, stability: Mapping[str, Any] | None) -> list[Refit]:
    """Return the refits of an expert that its eps^2 is of; none if all are within the rounding.

    Args:
        expert: its file, beside which `StabilityTwins(export=True)` left them.
        stability: what it measured of them, or None.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged, or a twin of another training.
    """
    content = file_hash(expert)
    found = [_checked(path, m, expert, content) for path, m in twin_files(expert).items()]
    m = counted(stability)
    if stability is not None and m is None:
        return []
    chosen = [refit for refit in found if refit.replaced == m]
    if not chosen:
        raise FileNotFoundError(
            f"No refits of {str(expert)!r}, with their distances measured, in "
            f"{str(twins_folder(expert))!r}. Train it with mergekit_lit.callbacks.StabilityTwins "
            "and `export` true."
        )
    return chosen


def delta2_by_refits(
    experts: Experts,
    merged: Merged,
    refits: Sequence[Sequence[Refit]],
    recipe: Recipe,
    backbone: Backbone,
    images: ImagesBySplit,
) -> float:
    """Return Delta_M^2 of the merge itself, linear or not, from the refits.

    sum_i p_i E_j ||M_i(.., x_i^(j), ..) - M_i(.., x_i, ..)||^2 / m,  p_i = 1 / T

    M_i is the model of task i, the same for all unless the method makes each task its own: only
    that one is ever asked for an answer to a sample of task i. Masks, thresholds and whatever else
    the method takes from the experts' tensors are found anew for each refit. For a linear merge
    with fixed coefficients it is sum_i p_i lambda_i^2 eps_i^2.

    A method that looks at images, or at cards, sees the same ones for each refit, not those that
    the replaced samples would have given: this is the part of the stability that goes through the
    experts alone. BatchNorm statistics have no part in the distance.

    Args:
        experts: T experts, in memory.
        merged: their merge by the recipe.
        refits: of each expert, at least one.
        recipe: what is merged how.
        backbone: a module of the architecture; never changed.
        images: what the recipe looks at.
    """
    names = experts.merged_names()
    total = 0.0
    for i, (task, own) in enumerate(zip(experts.names, refits, strict=True)):
        here, apart = merged.for_task(task), 0.0
        for refit in own:
            tuned = [*experts.tuned[:i], refit.backbone, *experts.tuned[i + 1 :]]
            other = merge_recipe(replace(experts, tuned=tuned), recipe, backbone, images)
            there = other.for_task(task)
            steps = [there[name] - here[name] for name in names]
            apart += float(squared_norm(steps)) / refit.replaced
        total += apart / len(own)
    return total / len(experts)


def _checked(path: Path, m: int, expert: Path, content: str) -> Refit:
    refit = load_expert(path)
    if refit.card.twin_of != content:
        raise ValueError(
            f"{str(path)!r} must be a twin of {str(expert)!r} as it is now, but is of another "
            "training. Train it again with mergekit_lit.callbacks.StabilityTwins and `export` true."
        )
    return Refit(m, refit.backbone)
