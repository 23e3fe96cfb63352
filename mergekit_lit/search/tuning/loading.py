"""This file loads what a search needs before its first trial: the images, and the bench."""

from collections.abc import Sequence
from dataclasses import replace

from mergekit_lit.core.experts import Expert, Experts
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.recalibration import declared_splits, images_by_split
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.objective import objective_of
from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.race import stages_of
from mergekit_lit.search.tuning.scores import Scorer, expert_rows
from mergekit_lit.stages.images import Calibration


def make_bench(
    experts: Experts,
    backbone: Backbone,
    tasks: Sequence[TaskData],
    plan: TuningPlan,
    calibration: Calibration,
) -> Bench:
    """Return the bench of a search.

    Args:
        experts: what is merged, each with its head.
        backbone: a module of their architecture, on the device to compute on.
        tasks: the images of each expert's task.
        plan: what is searched, and how.
        calibration: its `images` are shown to methods that look at some.

    Raises:
        KeyError: a weight of an unknown task.
        ValueError: a task without validation images; an expert without a head, or without the
            right image that normalised accuracy needs.
    """
    scorer = Scorer(backbone, tasks, compiled=plan.compile)
    rows = expert_rows(backbone, _each(experts), tasks)
    looked_at = [split for method in plan.methods for split in declared_splits(method, plan.then)]
    few = images_by_split(tasks, ["train"], count=plan.candidate_images, seed=plan.seed)
    return Bench(
        experts=experts,
        backbone=backbone,
        scorer=scorer,
        objective=objective_of(rows, goal=plan.objective, metric=plan.metric, weights=plan.weights),
        stages=stages_of(scorer.labels, seed=plan.seed, discard=plan.discard is not None),
        shown=images_by_split(tasks, looked_at, count=calibration.images, seed=plan.seed),
        statistics=few["train"],
        veneers=plan.then,
        batch_norm=plan.policies[0],
        seed=plan.seed,
        confidence=plan.confidence,
    )


def _each(experts: Experts) -> list[Expert]:
    """Return the experts one by one, under the names that they are merged by.

    Raises:
        ValueError: one has no head, so that it cannot be scored.
    """
    found = []
    for name, tuned, head, card in zip(
        experts.names, experts.tuned, experts.heads, experts.cards, strict=True
    ):
        if not head:
            raise ValueError(f"The expert of {name!r} must have a head to be scored, but has none.")
        found.append(Expert(tuned, head, experts.structure, replace(card, task=name)))
    return found
