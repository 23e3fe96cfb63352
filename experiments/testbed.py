"""This file is what experiments share: groups of tasks, and merges scored on a few images of each.

It is a module, not a command.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Callback
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params, flat
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.splits import Images, SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.evaluation import Model
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.recalibration import calibration_images, images_by_split, splits_needed
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.reports.results import csv_text
from mergekit_lit.stages.constants import objectives_at_base, objectives_at_merge
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.recipes import Recipe, merge_recipe
from mergekit_lit.stages.train import train_expert
from mergekit_lit.theory.constants import task_gradients
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.heterogeneity import gradient_products, mean_gradient_square
from mergekit_lit.theory.smoothness import measure_sample_gradients, measure_secant

Matrix: TypeAlias = NDArray[np.float64]

POLICY = "recalibrate-per-task"
"""BatchNorm statistics of every merge: estimated again on the task's own (few) training images."""


class Recorded:
    """A dataclass of what one record is made of."""

    @property
    def config(self: Any) -> dict[str, Any]:
        """What its record says of it."""
        return {**asdict(self), "batch_norm": POLICY}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a testbed is made of.

    Attributes:
        backbone: spec of the base.
        suite: name or folder of the suite.
        seed: seed of the split.
        train_share: share of the training images that the experts were trained on.
        images: largest number of images of a task and split that losses are measured on.
    """

    backbone: str
    suite: str
    seed: int
    train_share: float
    images: int


@dataclass(frozen=True)
class Around:
    """The loss of a group around its merge.

    Attributes:
        smoothness: L, the 95th percentile of the secants between base, merge and experts.
        gradient2: ||grad F_S(x_avg)||^2.
        sample_gradient2: G^2 at x_avg.
    """

    smoothness: float
    gradient2: float
    sample_gradient2: float


@dataclass(frozen=True)
class Slopes:
    """How the losses of T tasks fall at the base.

    Attributes:
        tasks: their names.
        gram: <grad F_Si(x0), grad F_Sj(x0)>, without bias, (T, T).
        means: grad F_Si(x0), (T, P).
    """

    tasks: tuple[str, ...]
    gram: Matrix
    means: Tensor

    def of(self, group: Sequence[str]) -> Matrix:
        """Return the products of a group's gradients."""
        places = self._places(group)
        return self.gram[np.ix_(places, places)]

    def along(self, group: Sequence[str], step: Tensor) -> list[float]:
        """Return <grad F_Si(x0), step> of each task of a group, step (P,)."""
        return [float(self.means[place].double() @ step) for place in self._places(group)]

    def zeta2(self, group: Sequence[str]) -> list[float]:
        """Return ||grad F_Si - grad F_S||^2 at x0 of each task of a group."""
        gram = self.of(group)
        apart = gram.diagonal() - 2 * gram.mean(1) + gram.mean()
        return [float(value) for value in apart]

    def _places(self, group: Sequence[str]) -> list[int]:
        return [self.tasks.index(task) for task in group]


class Testbed:
    """Base and images, loaded once in each process.

    Training images are those that the experts saw; losses are measured on a few images of each
    split, always the same, gradients on images drawn from all training images.
    """

    def __init__(self, place: Place) -> None:
        """Load what stays the same."""
        self.backbone, self.base = load_base(place.backbone)
        self._suite = load_suite(place.suite)
        self._options = SplitOptions(seed=place.seed, train_share=place.train_share)
        self._few = place.images
        self._data: dict[str, TaskData] = {}
        self._kept: dict[str, TaskData] = {}

    def data(self, tasks: Iterable[str]) -> list[TaskData]:
        """Return the few images of each of the tasks."""
        for task in self._whole(tasks):
            if task.name not in self._kept:
                self._kept[task.name] = replace(
                    task,
                    train=self._few_of(task.train, task.name),
                    val=self._few_of(task.val, task.name),
                    test=self._few_of(task.test, task.name),
                )
        return [self._kept[task] for task in tasks]

    def experts(self, files: Sequence[Path]) -> Experts:
        """Return experts of the base, in memory."""
        return in_memory(load_experts(files, base=self.base))

    def merged(self, experts: Experts, recipe: Recipe) -> Merged:
        """Return a merge under the recipe, with the few images where it looks at some."""
        needed = splits_needed(recipe.method, recipe.batch_norm, experts.structure)
        images = images_by_split(self.data(experts.names), needed)
        return merge_recipe(experts, recipe, self.backbone, images)

    def scores(
        self, models: Mapping[str, Model], experts: Experts, *, split: str
    ) -> dict[str, dict[str, Any]]:
        """Return loss and accuracy of models on the experts' tasks, by model and task."""
        heads = dict(zip(experts.names, experts.heads, strict=True))
        table = evaluate_models(
            self.backbone, models, self.data(experts.names), split=split, heads=heads
        )
        return {name: entry["tasks"] for name, entry in table.items()}

    def slopes(self, experts: Experts, effort: Effort) -> Slopes:
        """Return the inner products of the tasks' gradients at x0.

        Args:
            experts: whose heads the losses are taken with.
            effort: how much is looked at.
        """
        calibration, tasks = self._calibration(experts), self._whole(experts.names)
        objectives = objectives_at_base(experts, self.backbone, tasks, calibration)
        start = _moving(experts, experts.base)
        found = task_gradients(objectives, start, calibration, effort=effort)
        gram = gradient_products(found, [slice(None)])
        means = torch.stack([rows.mean(0) for rows in found.rows])
        return Slopes(tuple(experts.names), np.array(gram), means)

    def step(self, experts: Experts, merged: Merged) -> Tensor:
        """Return x_avg - x0 as one vector, (P,)."""
        base, weights = _moving(experts, experts.base), _moving(experts, merged.shared)
        return flat({name: weights[name].double() - base[name] for name in base})

    def around(self, experts: Experts, merged: Merged, effort: Effort) -> Around:
        """Return what the loss is like around a merge; secants are taken to two of its experts."""
        calibration = self._calibration(experts)
        objectives = objectives_at_merge(experts, merged, calibration)
        base, weights = _moving(experts, experts.base), _moving(experts, merged.shared)
        p = [1 / len(experts)] * len(experts)
        gradients = task_gradients(objectives, weights, calibration, effort=effort)
        few = replace(experts, **{name: getattr(experts, name)[:2] for name in _BY_EXPERT})
        each = measure_sample_gradients(objectives, weights, calibration, p=p, effort=effort)
        return Around(
            measure_secant(objectives, base, weights, few, calibration, effort=effort),
            mean_gradient_square(gradients, p).value,
            each.value,
        )

    def _few_of(self, images: Images, task: str) -> Images:
        return calibration_images(images, task, count=self._few)

    def _whole(self, tasks: Iterable[str]) -> list[TaskData]:
        for task in tasks:
            if task not in self._data:
                self._data[task] = self._suite.task(task).load(self._options)
        return [self._data[task] for task in tasks]

    def _calibration(self, experts: Experts) -> Calibration:
        images = {task.name: task.train for task in self._whole(experts.names)}
        return calibration_on(images, experts, backbone=self.backbone, split="train")


_BY_EXPERT = ("tuned", "cards", "heads", "names")


def _moving(experts: Experts, params: Params) -> dict[str, Tensor]:
    return {name: params[name].float() for name in experts.merged_names()}


@lru_cache(maxsize=1)
def testbed_of(place: Place) -> Testbed:
    """Return the testbed of a place, loaded once in each process."""
    return Testbed(place)


def trained(
    data: TaskDataModule,
    model: ExpertModule,
    *,
    steps: Sequence[int],
    out: Path,
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[int, Path]:
    """Return experts by step count, trained on one processor where they are missing.

    Args:
        data: the task.
        model: the base and how to tune it.
        steps: step counts.
        out: folder of the run.
        name: stem of the files; the task's name without one.
        callbacks: beside the standard ones.
    """
    result = train_expert(
        data=data,
        model=model,
        steps=steps,
        out=out,
        trainer={"accelerator": "cpu", "devices": 1},
        callbacks=callbacks,
        resume=True,
        name=name,
    )
    return dict(zip(sorted(set(steps)), result.experts, strict=True))


def write_rows(path: Path, rows: Callable[[], Iterable[Mapping[str, Any]]], **facts: Any) -> Path:
    """Make the rows of one experiment and write their record; a finished one is left.

    Args:
        path: of the record.
        rows: makes them.
        facts: of the record: stage, name, config and seeds.
    """
    if path.is_file():
        return path
    watch = Stopwatch()
    record = Record(metrics={"rows": list(rows())}, **facts)
    watch.finish(record).write(path)
    print(f"{path}: {record.cpu_seconds:.0f} CPU-seconds", flush=True)
    return path


def check_bases(specs: Iterable[str]) -> None:
    """Refuse, before any training, a base that cannot be loaded."""
    for spec in dict.fromkeys(specs):
        load_base(spec)


def groups_of(tasks: Sequence[str], size: int, count: int) -> list[tuple[str, ...]]:
    """Return random groups of tasks, drawn as the source draws them.

    `random.seed(s); random.sample(tasks, size)` for s = 0, 1, ..., until `count` groups differ.

    Args:
        tasks: the suite's, in its order, which the draws depend on.
        size: tasks in a group.
        count: number of groups; all that there are where they are fewer.

    Raises:
        ValueError: there are fewer tasks than a group is to hold.
    """
    if size > len(tasks):
        raise ValueError(f"A group must hold at most {len(tasks)} tasks, but `groups` says {size}.")
    distinct: dict[frozenset[str], tuple[str, ...]] = {}
    seeds = itertools.count()
    while len(distinct) < min(count, math.comb(len(tasks), size)):
        group = tuple(random.Random(next(seeds)).sample(list(tasks), size))
        distinct.setdefault(frozenset(group), group)
    return list(distinct.values())


def csv_of(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> str:
    """Return rows as a table: some columns first, the others by name, numbers to five digits."""
    names = {name for row in rows for name in row}
    columns = [*first, *sorted(names - set(first))]
    cells = [{name: row.get(name) for name in columns} for row in rows]
    return csv_text(
        [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in c.items()} for c in cells]
    )
