"""This file measures the constants of the bound on real images, at the base and at a merge."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.recalibration import task_statistics
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.merging.forms import has_adapters, is_per_task
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.constants import AtPoint, mean_loss, measure_point
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import ALL
from mergekit_lit.theory.heterogeneity import Estimate
from mergekit_lit.theory.norms import squared_norm
from mergekit_lit.theory.objective import Objective
from mergekit_lit.theory.signatures import Symptoms
from mergekit_lit.theory.smoothness import Smoothness, measure_sample_gradients, measure_smoothness


@dataclass(frozen=True)
class Measured:
    """What images tell of a merge.

    Attributes:
        base: at x0, under the merge's BatchNorm statistics: theory compares values of one function.
        merged: at x_avg, under the same.
        base_losses: of the base itself, under the statistics that each head was fitted under.
        smoothness: around them.
        sample_gradient2: G^2 at x_avg.
        step2: ||x_avg^l - x0^l||^2 by block l of the parameters.
        test: losses and accuracies on test images, by task.
        train: the same on training images.
    """

    base: AtPoint
    merged: AtPoint
    base_losses: Mapping[str, float]
    smoothness: Smoothness
    sample_gradient2: Estimate
    step2: Mapping[str, float]
    test: Mapping[str, Mapping[str, float]]
    train: Mapping[str, Mapping[str, float]]


def check_measurable(recipe: Recipe) -> None:
    """Refuse, before anything is read, a merge that `measure_merge` cannot look at.

    Args:
        recipe: what is merged how, after `check_recipe`.

    Raises:
        ValueError: the method makes each task a model of its own.
    """
    method = MERGE_METHODS.get(recipe.method)
    if is_per_task(method, resolve(method, recipe.config)) or has_adapters(method):
        raise ValueError(
            f"The bound is of one merged model, but {method.name!r} makes each task a model of its "
            "own by masks, layers or adapters. Choose another method, or leave `data.suite` out."
        )


def measure_merge(
    experts: Experts,
    merged: Merged,
    backbone: Backbone,
    tasks: Sequence[TaskData],
    *,
    effort: Effort,
    blocks: Sequence[Block] = (),
) -> Measured:
    """Measure losses, gradients and curvature at the base and at the merge.

    Args:
        experts: T experts, in memory.
        merged: their merge, one model for all tasks but for statistics.
        backbone: a module of the architecture; never changed.
        tasks: the images of each, as the experts saw them.
        effort: how much is looked at.
        blocks: of the parameters, where the merge's coefficients differ.
    """
    images = {task.name: task.train for task in tasks}
    calibration = calibration_on(images, experts, backbone=backbone, split="train")
    moving = experts.merged_names()
    p = [1 / len(experts)] * len(experts)
    at_base = objectives_at_base(experts, backbone, tasks, calibration)
    at_merge = objectives_at_merge(experts, merged, calibration)
    base = {name: experts.base[name].float() for name in moving}
    weights = {name: merged.shared[name].float() for name in moving}
    train, test = (
        _losses(
            evaluate_models(backbone, {"merged": merged}, tasks, split=split)["merged"]["tasks"]
        )
        for split in ("train", "test")
    )
    names = {block.name: block.tensors for block in blocks} or {ALL: moving}
    step = {name: weights[name] - base[name] for name in moving}
    losses = {task: row["loss"] for task, row in train.items()}
    return Measured(
        base=measure_point(
            at_merge, base, calibration, p=p, effort=effort, blocks=names, direction=step
        ),
        merged=measure_point(at_merge, weights, calibration, p=p, effort=effort, losses=losses),
        base_losses={o.task: mean_loss(o, base, calibration, effort) for o in at_base},
        smoothness=measure_smoothness(at_merge, base, weights, experts, calibration, effort=effort),
        sample_gradient2=measure_sample_gradients(
            at_merge, weights, calibration, p=p, effort=effort
        ),
        step2={
            block: float(squared_norm([step[name] for name in tensors]))
            for block, tensors in names.items()
        },
        test=test,
        train=train,
    )


def objectives_at_base(
    experts: Experts, backbone: Backbone, tasks: Sequence[TaskData], calibration: Calibration
) -> list[Objective]:
    """Return each task's loss around x0, under the statistics that its head was fitted under."""
    moving = experts.merged_names()
    return [
        _objective(
            task.name, {**experts.base, **_statistics(experts, backbone, task)}, moving, calibration
        )
        for task in tasks
    ]


def objectives_at_merge(
    experts: Experts, merged: Merged, calibration: Calibration
) -> list[Objective]:
    """Return each task's loss around x_avg, under the merge's own statistics."""
    moving = experts.merged_names()
    return [_objective(name, merged.for_task(name), moving, calibration) for name in experts.names]


def symptoms_of(experts: Experts, measured: Measured) -> Symptoms:
    """Return what the signatures of failure are looked for in."""
    train, test = measured.train, measured.test
    return Symptoms(
        lr=max((card.lr for card in experts.cards if card.lr is not None), default=None),
        eigenvalue=measured.smoothness.eigenvalue.value,
        base_loss=measured.base_losses,
        merged_loss={name: row["loss"] for name, row in train.items()},
        expert_loss={
            name: card.train_loss for name, card in zip(experts.names, experts.cards, strict=True)
        },
        gap={name: test[name]["loss"] - row["loss"] for name, row in train.items()},
        gradient2=measured.merged.gradient2.value,
        zeta2={name: estimate.value for name, estimate in measured.merged.zeta2.items()},
    )


def _objective(
    task: str, params: Params, moving: Sequence[str], calibration: Calibration
) -> Objective:
    """Return a task's loss under what of `params` does not move."""
    fixed = {name: tensor for name, tensor in params.items() if name not in set(moving)}
    return Objective(task, calibration, fixed)


def _statistics(experts: Experts, backbone: Backbone, task: TaskData) -> dict[str, Any]:
    """Return the statistics of the base on a task, as its head was fitted under them."""
    module = copy.deepcopy(backbone).eval()
    module.load_state_dict(dict(experts.base))
    return task_statistics(module, task)


def _losses(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return losses and accuracies of a merge by task, all finite."""
    for task, row in rows.items():
        # An evaluation tells NaN as None.
        if row["loss"] is None or not math.isfinite(row["loss"]):
            raise ValueError(
                f"The merge's loss must be finite, but on task {task!r} it is not. Leave out the "
                "expert that diverged, or merge with smaller coefficients."
            )
    return {task: {"loss": row["loss"], "accuracy": row["accuracy"]} for task, row in rows.items()}
