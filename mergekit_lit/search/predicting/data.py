"""This file is the features of images: losses and gradients at the base, and one probe merge.

No function here sees a test image: `blind` takes them from a task before anything is measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, drawn
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.recalibration import calibration_images, recalibrate, statistics_on
from mergekit_lit.lit.scores import Outcomes
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.predicting.columns import Column, Row, number, spread, spread_columns
from mergekit_lit.search.predicting.deltas import step_of
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.bound import coefficients_of, expert_facts
from mergekit_lit.stages.constants import objectives_at_base
from mergekit_lit.theory.bound import Bound, bound
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.constants import Effort, task_gradients
from mergekit_lit.theory.facts import ALL, ExpertFacts, MergeFacts
from mergekit_lit.theory.heterogeneity import TaskGradients, gradient_products, task_noise
from mergekit_lit.theory.objective import Objective

_TERMS = ("progress", "drift", "drift_closed_form", "merged_noise")
_OTHERS, _TASKS = "the other experts", "the tasks"

DATA_COLUMNS: tuple[Column, ...] = (
    Column("base_val_accuracy", "accuracy of the base on val images"),
    Column("base_val_loss", "cross-entropy of the base on val images"),
    Column("expert_val_accuracy", "accuracy of the expert on val images"),
    Column("expert_val_loss", "cross-entropy of the expert on val images"),
    *spread_columns("base_val_accuracies", "accuracy of the base on val images", _TASKS),
    *spread_columns("expert_val_accuracies", "accuracy of the experts on val images", _TASKS),
    Column("gradient2", "||grad F_t||^2 at the base, a U-statistic (may be negative)"),
    Column("gradient_noise", "tr Sigma of one sample's gradient at the base"),
    Column("zeta2", "||grad F_t - grad F_S||^2 at the base, a U-statistic"),
    Column("zeta2_mean", "zeta2, mean over the tasks"),
    Column("gradient_product", "<grad F_t, grad F_s>, mean over the other tasks"),
    Column("group_gradient2", "||grad F_S||^2 at the base, a U-statistic"),
    Column("gradient_step", "<grad F_t, step>: first order of the merge's loss"),
    Column("gradient_own", "<grad F_t, tau_t>: first order of the expert's loss"),
    *spread_columns("gradient_other", "<grad F_t, tau_s> for another expert s", _OTHERS),
    Column("curvature_own", "tau^T H tau along the expert's delta, by the secant of grad F_t"),
    Column("curvature_average", "the same along the step of the plain average"),
    Column("smoothness", "L of F_S, by the secant between base and plain average"),
    *(Column(f"bound_{name}", f"bound: {name.replace('_', ' ')}") for name in _TERMS),
)

PROBE_COLUMNS: tuple[Column, ...] = (
    Column("probe_val_accuracy", "accuracy of the plain average on val images"),
    Column("probe_val_loss", "cross-entropy of the plain average on val images"),
    Column("probe_train_loss", "the same on training images"),
    *spread_columns("probe_val_accuracies", "probe_val_accuracy", _TASKS),
    *spread_columns("probe_val_losses", "probe_val_loss", _TASKS),
    Column("probe_divergence", "bound of the plain average: divergence"),
    Column("probe_generalization", "bound of the plain average: generalization, Delta by path"),
    Column("probe_total", "bound of the plain average: total, Delta by path"),
)


@dataclass(frozen=True)
class Score:
    """How a model does on some images of one task.

    Attributes:
        accuracy: share right.
        loss: mean cross-entropy; NaN where a logit is not finite.
    """

    accuracy: float
    loss: float


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
    nothing = data.test.subset(torch.zeros(0, dtype=torch.int64).numpy())
    few = calibration_images(data.val, data.name, count=images)
    return replace(data, val=few, test=nothing)


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
    delta = _flat(tuned) - _flat(_moving(expert, expert.base))
    whole = dict(expert.tuned[0])
    return OfExpert(
        score_of(expert, whole, backbone, sight.data, scorer, effort=effort),
        _curvature(sight, tuned, delta),
    )


def score_of(
    expert: Experts,
    params: Mapping[str, Tensor],
    backbone: Backbone,
    data: TaskData,
    scorer: Scorer,
    *,
    effort: Effort,
) -> Score:
    """Score one set of weights under one expert's head, BatchNorm statistics estimated again."""
    (task,), (head,) = expert.names, expert.heads
    few = calibration_images(data.train, task, count=effort.images)
    statistics = statistics_on([few], params, backbone=backbone)
    model = Merged(params, expert.structure, heads={task: head}, statistics={task: statistics})
    return scores_on(scorer, model, [task])[task]


def scores_on(scorer: Scorer, model: Merged, tasks: Sequence[str]) -> dict[str, Score]:
    """Score a model on all images that the scorer has of some tasks."""
    places = {task: torch.arange(len(scorer.labels[task])) for task in tasks}
    return {task: _score(found) for task, found in scorer.outcomes(model, places).items()}


def _score(outcomes: Outcomes) -> Score:
    return Score(outcomes.accuracy, float(outcomes.loss.double().mean()))


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
    base = _flat(_moving(experts, experts.base))
    deltas = [_flat(_moving(experts, tuned)) - base for tuned in experts.tuned]
    merged = _moving(experts, average.shared)
    step = _flat(merged) - base
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


def of_data(experts: Experts, merged: Merged, seen: Seen) -> list[Row]:
    """Return what images tell of a merge before it is scored, a row a task."""
    terms = _bound(experts, coefficients_of(experts, merged), seen)
    step = _flat(step_of(experts, merged))
    count = len(experts)
    group = {
        **spread("base_val_accuracies", [sight.base.accuracy for sight in seen.sights]),
        **spread("expert_val_accuracies", [expert.score.accuracy for expert in seen.experts]),
        "zeta2_mean": number(sum(seen.zeta2) / count),
        "group_gradient2": number(float(seen.gram.mean())),
        "smoothness": number(seen.smoothness),
        **{f"bound_{name}": number(terms.terms[name].value if terms else None) for name in _TERMS},
    }
    return [
        {
            **group,
            **_alone(seen, t),
            "gradient_step": number(float(sight.mean @ step)),
        }
        for t, sight in enumerate(seen.sights)
    ]


def _alone(seen: Seen, t: int) -> Row:
    """Return what images tell of one task in its group, whatever the merge."""
    sight, expert = seen.sights[t], seen.experts[t]
    others = [s for s in range(len(seen.sights)) if s != t]
    products = [float(seen.gram[t, s]) for s in others]
    return {
        "base_val_accuracy": number(sight.base.accuracy),
        "base_val_loss": number(sight.base.loss),
        "expert_val_accuracy": number(expert.score.accuracy),
        "expert_val_loss": number(expert.score.loss),
        "gradient2": number(float(seen.gram[t, t])),
        "gradient_noise": number(seen.noise[t]),
        "zeta2": number(seen.zeta2[t]),
        "gradient_product": number(sum(products) / len(products) if products else None),
        "gradient_own": number(float(seen.along[t, t])),
        **spread("gradient_other", [float(seen.along[t, s]) for s in others]),
        "curvature_own": number(expert.curvature),
        "curvature_average": number(seen.curvatures[t]),
    }


@dataclass(frozen=True)
class Probe:
    """Scores of the plain average, by task.

    Attributes:
        val: on val images.
        train_loss: on training images.
    """

    val: Mapping[str, Score]
    train_loss: Mapping[str, float]


def probe_of(
    average: Merged, backbone: Backbone, sights: Sequence[Sight], scorer: Scorer, *, effort: Effort
) -> Probe:
    """Score the plain average on val images, and on the images of its statistics.

    Args:
        average: the merge, under any statistics.
        backbone: a module of the architecture; never changed.
        sights: of the tasks.
        scorer: of their val images.
        effort: `images` training images for BatchNorm statistics.
    """
    names = [sight.data.name for sight in sights]
    few = {
        sight.data.name: calibration_images(sight.data.train, sight.data.name, count=effort.images)
        for sight in sights
    }
    merged = recalibrate(average, few, backbone=backbone, per_task=True)
    shown = [replace(sight.data, val=few[sight.data.name]) for sight in sights]
    train = scores_on(Scorer(backbone, shown), merged, names)
    return Probe(
        scores_on(scorer, merged, names), {task: score.loss for task, score in train.items()}
    )


def of_probe(experts: Experts, seen: Seen, probe: Probe) -> list[Row]:
    """Return what the plain average's scores tell, a row a task, the same for every merge."""
    found = _bound(experts, [1 / len(experts)] * len(experts), seen, probe)
    val = [probe.val[task] for task in experts.names]
    told = {name: term.value for name, term in found.terms.items()} if found else {}
    group = {
        **spread("probe_val_accuracies", [score.accuracy for score in val]),
        **spread("probe_val_losses", [score.loss for score in val]),
        "probe_divergence": number(told.get("divergence")),
        "probe_generalization": number(told.get("generalization")),
        "probe_total": number(found.total if found else None),
    }
    return [
        {
            **group,
            "probe_val_accuracy": number(score.accuracy),
            "probe_val_loss": number(score.loss),
            "probe_train_loss": number(probe.train_loss[task]),
        }
        for task, score in zip(experts.names, val, strict=True)
    ]


def _bound(
    experts: Experts,
    coefficients: Sequence[float] | Sequence[Block] | None,
    seen: Seen,
    probe: Probe | None = None,
) -> Bound | None:
    """Return the bound of a sum of scaled deltas; None of any other merge."""
    if coefficients is None:
        return None
    blocks = [each for each in coefficients if isinstance(each, Block)]
    facts = [_facts(experts, seen, probe, t) for t in range(len(experts))]
    # By block the slopes would be needed block by block: progress is then unknown.
    gram = None if blocks else {ALL: seen.gram.tolist()}
    return bound(facts, MergeFacts(smoothness=seen.smoothness, gram=gram), coefficients)


def _facts(experts: Experts, seen: Seen, probe: Probe | None, t: int) -> ExpertFacts:
    card, task = experts.cards[t], experts.names[t]
    found = expert_facts(card, task, None, None)
    loss = probe.train_loss[task] if probe else None
    return replace(
        found,
        # No twins have calibrated the path estimate: what rests on it is called so.
        eps2=found.eps2_path,
        zeta2=seen.zeta2[t],
        base_loss=_finite(seen.sights[t].base.loss),
        train_loss=_finite(loss),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _curvature(sight: Sight, point: Mapping[str, Tensor], step: Tensor) -> float:
    """Return <grad F(x0 + step) - grad F(x0), step>, which is step^T H step to second order."""
    return float((sight.objective.gradient(point, sight.fixed) - sight.slope) @ step)


def _calibration(expert: Experts, backbone: Backbone, data: TaskData) -> Calibration:
    return calibration_on({data.name: data.train}, expert, backbone=backbone, split="train")


def _moving(experts: Experts, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: params[name].float() for name in experts.merged_names()}


def _flat(params: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])
