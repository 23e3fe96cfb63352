"""This file looks at experts with images of their tasks, as the rows of a table of merges were."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.recalibration import ImagesBySplit, declared_splits, images_by_split
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.predicting.cards import of_cards
from mergekit_lit.search.predicting.columns import Level, Row, joined
from mergekit_lit.search.predicting.data import of_data, of_probe
from mergekit_lit.search.predicting.deltas import angles_of, of_deltas, of_step
from mergekit_lit.search.predicting.probing import probe_of
from mergekit_lit.search.predicting.recording import images_at
from mergekit_lit.search.predicting.sights import (
    Seen,
    blind,
    look_at_expert,
    one_of,
    see,
    sight_of,
)
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.bound import check_same_images
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import base_of, load_base_of
from mergekit_lit.stages.recipes import Recipe, merge_recipe
from mergekit_lit.theory.effort import Effort

EFFORT = Effort(micro_batches=4, batch=40, hessian_images=24, images=64)
VAL_IMAGES = 100
"""How much is looked at of each task: as much as for the table, or features would not compare."""


@dataclass(frozen=True)
class Look:
    """What images tell of a group of experts.

    Attributes:
        experts: of the group.
        backbone: a module of their architecture; never changed.
        tasks: images of each, without those of test.
        seen: what holds whatever the merge.
        probed: what the plain average's scores add, a row a task; empty if nothing was probed.
    """

    experts: Experts
    backbone: Backbone
    tasks: Sequence[TaskData]
    seen: Seen
    probed: Sequence[Row]

    def merged(self, recipe: Recipe) -> Merged:
        """Return a merge, with a few training images where its method looks at some."""
        return merge_recipe(self.experts, recipe, self.backbone, self._images(recipe))

    def rows(self, merged: Merged) -> list[Row]:
        """Return what images tell of a merge before it is scored, a row a task."""
        known = of_data(self.experts, merged, self.seen)
        if not self.probed:
            return known
        return [{**row, **probed} for row, probed in zip(known, self.probed, strict=True)]

    def _images(self, recipe: Recipe) -> ImagesBySplit:
        splits = declared_splits(recipe.method, recipe.veneers)
        return images_by_split(self.tasks, splits, count=EFFORT.images, seed=recipe.seed)


def look(experts: Experts, backbone: Backbone, tasks: Sequence[TaskData], *, probe: bool) -> Look:
    """Look at base, experts and their plain average, never at an image of test.

    Args:
        experts: each with its head, in memory.
        backbone: a module of their architecture; never changed.
        tasks: images of each expert's task.
        probe: whether the plain average is scored on val images too.

    Raises:
        ValueError: an expert has no head, or a task no val images.
    """
    check_heads(experts)
    few = [blind(task, images=VAL_IMAGES) for task in tasks]
    effort = EFFORT.within(min(len(task.train) for task in few))
    scorer = Scorer(backbone, few)
    each = [one_of(experts, t) for t in range(len(experts))]
    sights = [
        sight_of(one, backbone, task, scorer, effort=effort)
        for one, task in zip(each, few, strict=True)
    ]
    alone = [
        look_at_expert(one, backbone, sight, scorer, effort=effort)
        for one, sight in zip(each, sights, strict=True)
    ]
    average = merge_recipe(experts, Recipe(), backbone, {})
    seen = see(experts, average, sights, alone)
    found = probe_of(average, backbone, few, scorer, effort=effort) if probe else None
    return Look(experts, backbone, few, seen, of_probe(experts, seen, found) if found else [])


def check_heads(experts: Experts) -> None:
    """Refuse experts without a head, of which no image tells anything.

    Raises:
        ValueError: an expert has none.
    """
    for name, head in zip(experts.names, experts.heads, strict=True):
        if not head:
            raise ValueError(
                f"The expert of {name!r} must have a head for its images to tell anything, but has "
                "none. Predict from cards and weights alone: `--level cards`."
            )


def open_experts(
    experts: Sequence[Path],
    level: Level,
    calibration: Calibration | None,
    *,
    base: str | None,
    allow_different_base: bool,
) -> tuple[Experts, Look | None]:
    """Return experts in memory, and what images tell of them where the level takes some.

    Args:
        experts: one file per expert, each of another task, all of one base.
        level: what is looked at.
        calibration: where the images come from.
        base: the base, if not the one that the first card names.
        allow_different_base: whether to take experts whose card names another base, or none.

    Raises:
        ValueError: images are wanted and no suite is named, experts that cannot be merged, or
            images that they were not trained on.
    """
    images = images_at(level, calibration)
    if images is None:
        loaded = base_of(experts, base)
    else:
        backbone, loaded = load_base_of(experts, base)
    found = in_memory(load_experts(experts, base=loaded, allow_different_base=allow_different_base))
    if images is None:
        return found, None
    tasks = list(images.tasks(found.names))
    check_same_images(found, tasks)
    return found, look(found, backbone, tasks, probe=level == "probe")


def known_rows(
    experts: Experts, recipes: Sequence[Recipe], looked: Look | None = None
) -> Iterator[Row]:
    """Yield a row a merge and task: what cards, deltas and the step tell, and images if any.

    Args:
        experts: in memory.
        recipes: the merges.
        looked: what images of the tasks tell.
    """
    angles = of_deltas(experts, angles_of(experts))
    for place, recipe in enumerate(recipes):
        merged = looked.merged(recipe) if looked else merge_recipe(experts, recipe, None, {})
        keys = [
            {
                "backbone": experts.backbone,
                "suite": card.suite or "",
                "real": False,
                "group": "",
                "merge": place,
                "method": recipe.method,
                "task": name,
            }
            for name, card in zip(experts.names, experts.cards, strict=True)
        ]
        parts = [keys, of_cards(experts, merged), angles, of_step(experts, merged)]
        yield from joined(*parts, *([looked.rows(merged)] if looked else []))
