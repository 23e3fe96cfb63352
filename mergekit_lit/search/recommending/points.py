"""This file holds what is known of a way to train: merges measured on its trajectory."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_lit.search.recommending.site import TaskScore
from mergekit_lit.search.recommending.space import Way
from mergekit_lit.theory.facts import Gram


@dataclass(frozen=True, kw_only=True)
class OfExpert:
    """What one expert on a trajectory tells.

    Attributes:
        task: its task.
        n: training images.
        travel: eta ||a||_1; effective for adaptive optimizers.
        noise: sigma^2 of one sample, averaged along the path.
        d2: mean squared displacement along the path.
        train_loss: its own, on all training images.
        val_loss: its own, on validation images.
    """

    task: str
    n: int
    travel: float
    noise: float
    d2: float
    train_loss: float
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """A merge of experts that were trained in one way for K steps, measured.

    Attributes:
        way: how they were trained.
        steps: K.
        experts: a row an expert.
        scores: of the merge, by task.
    """

    way: Way
    steps: int
    experts: tuple[OfExpert, ...]
    scores: Mapping[str, TaskScore]

    @property
    def travel(self) -> float:
        """Mean travel of the experts: A_eff of their average."""
        return math.fsum(each.travel for each in self.experts) / len(self.experts)

    @property
    def noise(self) -> float:
        """Mean sigma^2 along the paths."""
        return math.fsum(each.noise for each in self.experts) / len(self.experts)

    @property
    def train_loss(self) -> float:
        """Of the merge, mean over the tasks."""
        return mean_of(self.scores, "train_loss")

    @property
    def val_loss(self) -> float:
        """Of the merge, mean over the tasks."""
        return mean_of(self.scores, "val_loss")

    @property
    def accuracy(self) -> float:
        """Of the merge, mean over the tasks."""
        return mean_of(self.scores, "accuracy")


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What images tell of the loss on the probes' tasks.

    Attributes:
        base: scores of the base, by task.
        base_loss: F_Si(x0) on all training images, by task.
        noise: sigma_i^2 at the base, by task.
        zeta2: ||grad F_Si - grad F_S||^2 there, by task.
        gradient2: ||grad F_S||^2 there.
        gram: <grad F_Si, grad F_Sj> there.
        smoothness: L, the 95th percentile of the secants around a merge; None if nothing moved.
        sample_gradient2: G^2 at that merge.
    """

    base: Mapping[str, TaskScore]
    base_loss: Mapping[str, float]
    noise: Mapping[str, float]
    zeta2: Mapping[str, float]
    gradient2: float
    gram: Gram
    smoothness: float | None
    sample_gradient2: float

    @property
    def base_gap(self) -> float:
        """Validation less training loss of the base, on the images that merges are scored on."""
        return mean_of(self.base, "val_loss") - mean_of(self.base, "train_loss")


@dataclass(frozen=True)
class Probed:
    """What the probes found.

    Attributes:
        constants: of the loss.
        points: of each rate, two.
        failed: why a rate has none, by name of its probe.
    """

    constants: Constants
    points: tuple[Point, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Probed":
        """Return what `to_json` wrote."""
        constants = dict(value["constants"])
        constants["base"] = _scores(constants["base"])
        points = tuple(point_from(each) for each in value["points"])
        return cls(Constants(**constants), points, dict(value["failed"]))


def mean_of(scores: Mapping[str, TaskScore], name: str) -> float:
    """Return the mean of a score over the tasks."""
    return math.fsum(getattr(each, name) for each in scores.values()) / len(scores)


def point_from(value: Mapping[str, Any]) -> Point:
    """Return a point from plain values."""
    return Point(
        way=Way(**value["way"]),
        steps=value["steps"],
        experts=tuple(OfExpert(**each) for each in value["experts"]),
        scores=_scores(value["scores"]),
    )


def _scores(value: Mapping[str, Any]) -> dict[str, TaskScore]:
    return {task: TaskScore(**each) for task, each in value.items()}
