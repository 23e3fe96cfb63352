"""This file scores base, experts and a probe merge on images that no outcome is measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.recalibration import calibration_images, recalibrate, statistics_on
from mergekit_lit.lit.scores import Outcomes
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.theory.effort import Effort


@dataclass(frozen=True)
class Score:
    """How a model does on some images of one task.

    Attributes:
        accuracy: share right.
        loss: mean cross-entropy; NaN where a logit is not finite.
    """

    accuracy: float
    loss: float


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
    average: Merged,
    backbone: Backbone,
    tasks: Sequence[TaskData],
    scorer: Scorer,
    *,
    effort: Effort,
) -> Probe:
    """Score the plain average on val images, and on the images of its statistics.

    Args:
        average: the merge, under any statistics.
        backbone: a module of the architecture; never changed.
        tasks: without test images.
        scorer: of their val images.
        effort: `images` training images for BatchNorm statistics.
    """
    names = [task.name for task in tasks]
    few = {
        task.name: calibration_images(task.train, task.name, count=effort.images) for task in tasks
    }
    merged = recalibrate(average, few, backbone=backbone, per_task=True)
    shown = [replace(task, val=few[task.name]) for task in tasks]
    train = scores_on(Scorer(backbone, shown), merged, names)
    return Probe(
        scores_on(scorer, merged, names), {task: score.loss for task, score in train.items()}
    )
