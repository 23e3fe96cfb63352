"""This file looks at images before a merge is scored: gradients and curvatures at the base.

No function here needs a test image: `blind` takes them from a task before anything is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, drawn
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import flat
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.recalibration import calibration_images
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.predicting.probing import Score, score_of
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.constants import objectives_at_base
from mergekit_lit.theory.constants import task_gradients
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.heterogeneity import TaskGradients, gradient_products, task_noise
from mergekit_lit.theory.objective import Objective


@dataclass(frozen=True)
class Sight:
    """What images of one task tell of the base, under one expert's head.

    Attributes:
        data: the task without its test images.
        base: on val.
        objective: F_t around x0.
        gradients: over micro-batches, (K, P).
        batch: images in one of them.
        size: training images that they were drawn from.
        fixed: a batch that secants are taken on.
        slope: gradient at x0 on that batch, (P,).
    """

    data: TaskData
    base: Score
    objective: Objective
    gradients: Tensor
    batch: int
    size: int
    fixed: Batch
    slope: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """The gradient over all images that were drawn, (P,)."""
        return self.gradients.mean(0)


@dataclass(frozen=True)
class OfExpert:
    """What images of one task tell of its expert.

    Attributes:
        score: on val.
        curvature: tau^T H tau, by the secant.
    """

    score: Score
    curvature: float


@dataclass(frozen=True)
class Seen:
    """What images tell of a group, whatever the merge.

    Attributes:
        sights: of each task.
        experts: of each expert.
        gram: <grad F_t, grad F_s> at x0, (T, T).
        noise: tr Sigma of each task.
        along: <grad F_t, tau_s>, (T, T).
        curvatures: of each F_t along the step of the plain average.
        smoothness: L of F_S between base and plain average; None where it did not move.
    """

    sights: Sequence[Sight]
    experts: Sequence[OfExpert]
    gram: Tensor
    noise: Sequence[float]
    along: Tensor
    curvatures: Sequence[float]
    smoothness: float | None

    @property
    def zeta2(self) -> list[float]:
        """||grad F_t - grad F_S||^2 of each task."""
        found: list[float] = (
            self.gram.diagonal() - 2 * self.gram.mean(1) + self.gram.mean()
        ).tolist()
        return found


def blind(data: TaskData, *, images: int) -> TaskData:
    """Return a task without test images, and with at most so many of val."""
    few = calibration_images(data.val, data.name, count=images)
    return replace(data.without_test(), val=few)


def one_of(experts: Experts, t: int) -> Experts:
    """Return one of the experts."""
    names = ("tuned", "cards", "heads", "names")
    return replace(experts, **{name: getattr(experts, name)[t : t + 1] for name in names})


def sight_of(
    expert: Experts, backbone: Backbone, data: TaskData, scorer: Scorer, *, effort: Effort
) -> Sight:
    """Look at the base with one expert's head.

    Args:
        expert: one expert.
        backbone: a module of the architecture; never changed.
        data: its task, without test images.
        scorer: of the val images of this task, among others.
        effort: micro-batches and their size; `images` training images for BatchNorm statistics.
    """
    calibration = _calibration(expert, backbone, data)
    (objective,) = objectives_at_base(expert, backbone, [data], calibration)
    start = _moving(expert, expert.base)
    found = task_gradients([objective], start, calibration, effort=effort)
    samples = calibration.samples[data.name]
    chosen = drawn(samples, effort.hessian_images, "secant", data.name, seed=effort.seed)
    fixed = samples.take(chosen)
    return Sight(
        data=data,
        base=score_of(expert, dict(expert.base), backbone, data, scorer, effort=effort),
        objective=objective,
        gradients=found.rows[0],
        batch=found.batch,
        size=len(samples),
        fixed=fixed,
        slope=objective.gradient(start, fixed),
    )


def look_at_expert(
    expert: Experts, backbone: Backbone, sight: Sight, scorer: Scorer, *, effort: Effort
) -> OfExpert:
    """Look at one expert with the images of its task; the arguments are those of `sight_of`."""
    tuned = _moving(expert, expert.tuned[0])
    delta = flat(tuned) - flat(_moving(expert, expert.base))
    whole = dict(expert.tuned[0])
    return OfExpert(
        score_of(expert, whole, backbone, sight.data, scorer, effort=effort),
        _curvature(sight, tuned, delta),
    )


def see(
    experts: Experts, average: Merged, sights: Sequence[Sight], alone: Sequence[OfExpert]
) -> Seen:
    """Look at a group.

    Args:
        experts: T experts.
        average: their plain average.
        sights: of their tasks.
        alone: of the experts.
    """
    rows, sizes = [sight.gradients for sight in sights], [sight.size for sight in sights]
    gradients = TaskGradients(rows, sights[0].batch, sizes)
    base = flat(_moving(experts, experts.base))
    deltas = [flat(_moving(experts, tuned)) - base for tuned in experts.tuned]
    merged = _moving(experts, average.shared)
    step = flat(merged) - base
    slopes = [sight.objective.gradient(merged, sight.fixed) - sight.slope for sight in sights]
    length = float(step.norm())
    apart = float(torch.stack(slopes).mean(0).norm())
    return Seen(
        sights=sights,
        experts=alone,
        gram=torch.tensor(gradient_products(gradients, [slice(None)]), dtype=torch.float64),
        noise=[task_noise(gradients, t).value for t in range(len(sights))],
        along=torch.tensor([[float(s.mean @ delta) for delta in deltas] for s in sights]),
        curvatures=[float(slope @ step) for slope in slopes],
        smoothness=apart / length if length else None,
    )


def _curvature(sight: Sight, point: Mapping[str, Tensor], step: Tensor) -> float:
    """Return <grad F(x0 + step) - grad F(x0), step>, which is step^T H step to second order."""
    return float((sight.objective.gradient(point, sight.fixed) - sight.slope) @ step)


def _calibration(expert: Experts, backbone: Backbone, data: TaskData) -> Calibration:
    return calibration_on({data.name: data.train}, expert, backbone=backbone, split="train")


def _moving(experts: Experts, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: params[name].float() for name in experts.merged_names()}
