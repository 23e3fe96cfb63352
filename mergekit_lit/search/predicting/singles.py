"""This file scores merges beside what needs no merge: one network, with new heads where it must.

Nothing here looks at a test image. BatchNorm statistics are estimated again for every network and
task, so that no network is judged by those of another.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.params import Params
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.passes import features_of
from mergekit_lit.lit.recalibration import ImagesBySplit, calibration_images, recalibrate
from mergekit_lit.lit.scores import Outcomes
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.heads import fit_ncm
from mergekit_lit.search.predicting.predict import Interval
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.recipes import Recipe, merge_recipe

POLICY: BatchNormPolicy = "recalibrate-per-task"

# Half the width of a 90 % interval in standard errors.
_Z90 = 1.6449

ByTask = Mapping[str, Outcomes]


class Bench:
    """The images of some tasks, and a network to look at them with."""

    def __init__(
        self, backbone: Backbone, tasks: Sequence[TaskData], *, images: int, seed: int = 0
    ) -> None:
        """Choose the images.

        Args:
            backbone: a module of the architecture; never changed.
            tasks: with training and validation images.
            images: largest number of a task's training images that are looked at.
            seed: of the choice.

        Raises:
            ValueError: a task has no validation image.
        """
        blind = [task.without_test() for task in tasks]
        self._backbone = backbone
        self._scorer = Scorer(backbone, blind)
        self._train = {
            task.name: calibration_images(task.train, task.name, count=images, seed=seed)
            for task in blind
        }

    def scores(self, model: Merged) -> ByTask:
        """Return what a model does on validation images of each task."""
        return self._scorer.outcomes(model)

    def merged(self, experts: Experts, method: str) -> Merged:
        """Return the merge by a method with its defaults."""
        recipe = Recipe(method=method, batch_norm=POLICY)
        images: ImagesBySplit = {"train": self._train}
        return merge_recipe(experts, recipe, self._backbone, images)

    def single(self, experts: Experts, params: Params, own: str | None = None) -> Merged:
        """Return one network with a head for each task, which takes no merge.

        Args:
            experts: whose tasks these are.
            params: every tensor of the network.
            own: the task whose head it keeps; for the others nearest class means are fitted.
        """
        heads = dict(zip(experts.names, experts.heads, strict=True))
        plain = Merged(params, experts.structure, heads=heads)
        model = recalibrate(plain, self._train, backbone=self._backbone, per_task=True)
        fitted = {
            task: head if task == own else self._fitted(model, task, len(head["weight"]))
            for task, head in heads.items()
        }
        return Merged(params, experts.structure, heads=fitted, statistics=model.statistics)

    def _fitted(self, model: Merged, task: str, classes: int) -> dict[str, Tensor]:
        """Return the nearest class means of a task in the features of a model."""
        module = copy.deepcopy(self._backbone).eval()
        module.load_state_dict(model.for_task(task))
        return fit_ncm(*features_of(module, self._train[task]), classes)


@dataclass(frozen=True)
class Looked:
    """What networks do on validation images of some tasks.

    Attributes:
        merges: by the way to merge.
        singles: networks that need no merge, by what they are.
        kept: each task's own expert on it: what keeping them apart gives.
    """

    merges: Mapping[str, ByTask]
    singles: Mapping[str, ByTask]
    kept: ByTask

    @property
    def best(self) -> str:
        """Which single network has the best mean accuracy."""
        return max(self.singles, key=lambda name: self.accuracy(name).value)

    def accuracy(self, single: str) -> Interval:
        """Return the mean accuracy of one single network."""
        return mean_of(self.singles[single], "correct")

    def scores(self, method: str) -> dict[str, Interval]:
        """Return the accuracy of one way to merge, what it costs, and what it gains."""
        scored = self.merges[method]
        return {
            "accuracy": mean_of(scored, "correct"),
            "cost": difference(self.kept, scored, "correct"),
            "loss_cost": difference(scored, self.kept, "loss"),
            "gain": difference(scored, self.singles[self.best], "correct"),
        }

    def tasks(self, method: str) -> dict[str, float]:
        """Return the accuracy of one way to merge on each task."""
        return {task: of.accuracy for task, of in self.merges[method].items()}


def mean_of(outcomes: ByTask, field: Literal["correct", "loss"]) -> Interval:
    """Return accuracy or loss, the mean over tasks, with its 90 % interval over the images."""
    return _interval([getattr(of, field).double() for of in outcomes.values()])


def difference(one: ByTask, other: ByTask, field: Literal["correct", "loss"]) -> Interval:
    """Return how much higher the first is on the same images, the mean over tasks, so too."""
    return _interval(
        [
            getattr(of, field).double() - getattr(other[task], field).double()
            for task, of in one.items()
        ]
    )


def _interval(rows: Sequence[Tensor]) -> Interval:
    """Return the mean of the tasks' means, and where it lies by the normal law of the images."""
    mean = math.fsum(float(row.mean()) for row in rows) / len(rows)
    variance = math.fsum(float(row.var(correction=0)) / len(row) for row in rows)
    half = _Z90 * math.sqrt(variance) / len(rows) if math.isfinite(variance) else math.nan
    return Interval(mean, mean - half, mean + half)
