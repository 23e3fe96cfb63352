"""This file is where recommendations are tried out: experts are trained, merged and scored.

Test images are taken from every task before anything is done with it.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule, Start
from mergekit_lit.lit.heads import Head, head_at
from mergekit_lit.lit.passes import score
from mergekit_lit.lit.recalibration import (
    calibration_images,
    images_by_split,
    splits_needed,
    task_statistics,
)
from mergekit_lit.lit.scores import Outcomes
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.reports.intervals import pack_flags
from mergekit_lit.search.recommending.expecting import Share
from mergekit_lit.search.recommending.space import Space, Way
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.recipes import Recipe, merge_recipe
from mergekit_lit.stages.train import train_expert

POLICY: BatchNormPolicy = "recalibrate-per-task"
"""BatchNorm statistics of every merge: estimated again on training images of each task."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays the same for all candidates.

    Attributes:
        suite: name or folder of the suite.
        tasks: its tasks that are to be merged.
        backbone: spec of the base.
        head: how heads are made, as `ExpertModule` takes it.
        method: the merge method.
        config: values of its parameters.
        space: of candidates.
        images: largest number of training images of a task for the statistics and the training
            loss of a merge.
        root: folder of the downloaded data sets.
        val_share: share of the training images carved out for validation.
        reserve: training images carved out that no run trains on.
        n: training images of a task, of which ways take shares; None for all.
        seed: of the split, the order of images and all draws.
    """

    suite: str
    tasks: tuple[str, ...]
    backbone: str
    head: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    space: Space
    images: int
    root: Path | None
    val_share: float
    reserve: int
    n: int | None = None
    seed: int

    @property
    def coefficient(self) -> float | None:
        """The weight of an expert in the average of all tasks; None for other methods."""
        return 1 / len(self.tasks) if self.method == "average" else None

    def split(self, share: float = 1.0) -> SplitOptions:
        """Return how a task is carved."""
        # A share of n is a number of images too.
        count = None if self.n is None else max(2, round(share * self.n))
        return SplitOptions(
            val_share=self.val_share,
            reserve=self.reserve,
            train_share=share if self.n is None else 1.0,
            n=count,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TaskScore:
    """How a merge does on one task.

    Attributes:
        train_loss: cross-entropy on a few training images.
        val_loss: on all validation images.
        accuracy: share of these that are right.
        right: which of them, packed.
        images: how many there are.
    """

    train_loss: float
    val_loss: float
    accuracy: float
    right: str
    images: int


class Train(Protocol):
    """Trains the expert of one task in one way.

    `steps` are all step counts that the trajectory may ever be asked for, `until` where it may
    stop for now; the experts up to there are returned, by K.
    """

    def __call__(self, way: Way, task: str, steps: Sequence[int], until: int) -> Mapping[int, Path]:
        """Train what is missing."""


class Site:
    """Base, images and networks, loaded once."""

    def __init__(self, setting: Setting, folder: Path, *, train: Train | None = None) -> None:
        """Load the base; images wait until they are needed.

        Args:
            setting: what stays the same.
            folder: where trainings go.
            train: trains in place of `train_expert`.
        """
        self.setting, self._folder = setting, folder
        self.backbone, self.base = load_base(setting.backbone)
        self._suite = load_suite(setting.suite, root=setting.root)
        self._train = train or self._trained
        self._data: dict[tuple[str, float], TaskData] = {}
        self._starts: dict[tuple[str, float], dict[Any, Start]] = {}
        self._scorers: dict[str, tuple[Scorer, Scorer]] = {}

    def data(self, task: str, share: float = 1.0) -> TaskData:
        """Return the images of a task, without its test images."""
        if (task, share) not in self._data:
            whole = self._suite.task(task).load(self.setting.split(share), root=self.setting.root)
            self._data[task, share] = whole.without_test()
        return self._data[task, share]

    def train(self, way: Way, task: str, steps: Sequence[int], until: int) -> dict[int, Path]:
        """Return the expert of each K up to `until`; train what is missing of them."""
        return dict(self._train(way, task, steps, until))

    def merged(self, files: Sequence[Path]) -> tuple[Experts, Merged]:
        """Return experts, in memory, and their merge.

        An average of some of the tasks weighs each expert as the average of all would: with more
        weight it would bear, and seem to want, more training.
        """
        experts = in_memory(load_experts(files, base=self.base))
        method, config = self.setting.method, self.setting.config
        if self.setting.coefficient is not None:
            method, config = "task_arithmetic", {"scale": self.setting.coefficient}
        return experts, self._with_statistics(experts, method, config)

    def at_base(self, files: Sequence[Path]) -> Merged:
        """Return the base under the heads of some experts, statistics estimated as for merges."""
        experts = in_memory(load_experts(files, base=self.base))
        return self._with_statistics(experts, "task_arithmetic", {"scale": 0.0})

    def base_share(self, task: str) -> Share:
        """Return how many validation images the base has right, under a frozen head."""
        data, module = self.data(task), copy.deepcopy(self.backbone).eval()
        module.load_state_dict(dict(self.base.params))
        module.load_state_dict({**module.state_dict(), **task_statistics(module, data)})
        params = head_at(module, data, self.setting.head, seed=self.setting.seed)
        found = score(module, Head(params, trained=False), data.val)
        return Share(found.accuracy or 0.0, len(data.val))

    def scores(self, merged: Merged) -> dict[str, TaskScore]:
        """Return how a merge does on each of its tasks."""
        found = {}
        for task in merged.tasks:
            shown, held_out = (scorer.outcomes(merged)[task] for scorer in self._scorers_of(task))
            found[task] = _score(shown, held_out)
        return found

    def _with_statistics(self, experts: Experts, method: str, config: Mapping[str, Any]) -> Merged:
        recipe = Recipe(method=method, config=config, batch_norm=POLICY, seed=self.setting.seed)
        needed = splits_needed(method, POLICY, experts.structure)
        tasks = [self.data(task) for task in experts.names]
        images = images_by_split(tasks, needed, count=self.setting.images)
        return merge_recipe(experts, recipe, self.backbone, images)

    def _scorers_of(self, task: str) -> tuple[Scorer, Scorer]:
        """Return what scores a task's few training images, and its validation images."""
        if task not in self._scorers:
            data = self.data(task)
            few = calibration_images(data.train, task, count=self.setting.images)
            pair = [Scorer(self.backbone, [d]) for d in (replace(data, val=few), data)]
            self._scorers[task] = pair[0], pair[1]
        return self._scorers[task]

    def _trained(self, way: Way, task: str, steps: Sequence[int], until: int) -> dict[int, Path]:
        """Train one trajectory until a step, from where it was left before."""
        out, setting = self._folder / way.name, self.setting
        export = ExpertExport(out, steps=steps, name=task)
        files = {k: export.path(task, k) for k in sorted(steps) if k <= until}
        if all(path.is_file() for path in files.values()):
            return files
        data = TaskDataModule(
            setting.suite,
            task,
            batch=way.batch,
            n=setting.split(way.share).n,
            train_share=setting.split(way.share).train_share,
            val_share=setting.val_share,
            reserve=setting.reserve,
            split_seed=setting.seed,
            root=setting.root,
        )
        data.task_data = self.data(task, way.share)
        chosen = setting.space.training_of(way.optimizer, way.lr)
        model = ExpertModule(setting.backbone, head=setting.head, seed=setting.seed, **chosen)
        model.starts = self._starts.setdefault((task, way.share), {})
        with suppress(InterruptedError):
            train_expert(
                data=data,
                model=model,
                steps=steps,
                out=out,
                callbacks=[_Pause(until)],
                resume=True,
                name=task,
                checkpoint_every=max(steps),
            )
        return files


class _Pause(Callback):
    """Ends a training as a step begins, just after its checkpoint has been written."""

    def __init__(self, until: int) -> None:
        self._until = until

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave, if enough steps are taken."""
        del pl_module, batch, batch_idx
        if trainer.global_step >= self._until:
            raise InterruptedError(f"Paused at step {trainer.global_step}.")


def _score(shown: Outcomes, held_out: Outcomes) -> TaskScore:
    return TaskScore(
        train_loss=float(shown.loss.double().mean()),
        val_loss=float(held_out.loss.double().mean()),
        accuracy=held_out.accuracy,
        right=pack_flags(held_out.correct.numpy()),
        images=len(held_out),
    )
