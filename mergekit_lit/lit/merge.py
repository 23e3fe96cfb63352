"""This file is evaluation under a Trainer: every model on every task, exact over processes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.params import Params
from mergekit_lit.lit.evaluation import (
    Entry,
    EvaluationBatchNorm,
    Model,
    entries_for,
    experts_of,
    heads_of,
    observe,
)
from mergekit_lit.lit.passes import pixels
from mergekit_lit.lit.recalibration import (
    ImagesBySplit,
    Veneers,
    images_by_split,
    merge_calibrated,
    splits_needed,
)
from mergekit_lit.lit.scores import OutcomeLog, Outcomes, no_outcomes, score_table
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.models.backbones import Backbone

_LOGGED = ("accuracy", "loss", "calibration_error")


@dataclass(frozen=True)
class PendingMerge:
    """A merge yet to be made, in sight of the Trainer's merge callbacks.

    Attributes:
        experts: what is merged.
        method: name of the merge method.
        config: its configuration.
        batch_norm: where the BatchNorm statistics come from, as in `merge_calibrated`.
        seed: seed of the merge.
        images: images of each task by split, as `merge_calibrated` takes them; None for those of
            the MergeDataModule.
        veneers: names and configs of veneers, as in `merge_calibrated`.
    """

    experts: Experts
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    batch_norm: BatchNormPolicy = "base"
    seed: int = 0
    images: ImagesBySplit | None = None
    veneers: Veneers = ()


class MergeModule(LightningModule):
    """Evaluates a base, experts and merged models on every task of a `MergeDataModule`.

    `trainer.test(module, data)` logs `accuracy/<model>/<task>` and, for each measure, the mean
    `accuracy/<model>`; `results()` has everything, with intervals. Pending merges are
    made in `setup`, in sight of the Trainer's callbacks: those that have the methods of
    `core.merging.MergeObserver` are called, and may change the deltas. Every process makes them,
    and goes on with the first one's result.

    Attributes:
        models: the models by name, pending merges made by `setup`.
        outcomes: after the test, what each model did on each image, by model and task.
    """

    def __init__(
        self,
        backbone: Backbone,
        models: Mapping[str, Model | PendingMerge],
        *,
        heads: Mapping[str, Params] | None = None,
        batch_norm: EvaluationBatchNorm = "recalibrate-per-task",
        seed: int = 0,
    ) -> None:
        """Hold what is to be evaluated; models are never changed.

        Args:
            backbone: the models' architecture; its own values are not used.
            models: models by name; a sequence of experts is one model, each on its own task.
            heads: heads of the bases by task; the experts' by default.
            batch_norm: BatchNorm statistics of bases and experts, `stored` or
                `recalibrate-per-task`; merged models carry theirs.
            seed: seed of the intervals.
        """
        super().__init__()
        # A process may hold no batch of a small task.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.backbone = copy.deepcopy(backbone).requires_grad_(requires_grad=False)
        self.models = dict(models)
        self.heads = heads
        self.batch_norm: EvaluationBatchNorm = batch_norm
        self.seed = seed
        self.log_of_outcomes = OutcomeLog()
        self.outcomes: dict[str, dict[str, Outcomes]] = {}
        self._entries: list[Entry] = []
        self._task = -1

    def setup(self, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Make the merges that are still pending.

        Raises:
            KeyError: a policy that needs images, and no images of a task.
            TypeError: the data is no MergeDataModule.
        """
        self._data()
        # Lightning's callback connector sets the attribute, unknown to type checkers.
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        observers = [callback for callback in callbacks if isinstance(callback, MergeObserver)]
        for name, model in self.models.items():
            if isinstance(model, PendingMerge):
                self.models[name] = self._merged(model, observers)

    def on_test_start(self) -> None:
        """Forget an earlier test."""
        self.log_of_outcomes.reset()
        # A process whose batches no model is evaluated on takes part in the gathering too.
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.log_of_outcomes.update(0, nothing, no_outcomes(self.device))
        self._task = -1

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002 (Lightning's signature)
        """Load the models of a task with its first batch, in place of the last task's."""
        if dataloader_idx == self._task:
            return
        models = self._models()
        self._entries = entries_for(
            models,
            self._data().task_data[dataloader_idx],
            self.backbone,
            heads=self.heads if self.heads is not None else heads_of(models),
            batch_norm=self.batch_norm,
        )
        self._task = dataloader_idx

    def test_step(
        self,
        batch: tuple[Tensor, Tensor, Tensor],
        batch_idx: int,  # noqa: ARG002 (Lightning's signature)
        dataloader_idx: int = 0,
    ) -> None:
        """Score one batch of one task with every model."""
        x, labels, position = batch
        images = pixels(self.backbone, x)
        for entry in self._entries:
            cell = self._cell(entry.model, dataloader_idx)
            outcomes = observe(self.backbone, entry, images, labels)
            self.log_of_outcomes.update(cell, position, outcomes)

    def on_test_epoch_end(self) -> None:
        """Gather the outcomes of all processes and log their means."""
        tasks = [data.name for data in self._data().task_data]
        gathered = self.log_of_outcomes.outcomes()
        self.outcomes = {}
        for cell, outcomes in gathered.items():
            model, task = divmod(cell, len(tasks))
            self.outcomes.setdefault(list(self.models)[model], {})[tasks[task]] = outcomes
        self._entries = []
        for name, table in self.results().items():
            self._log_table(name, table)

    def results(self) -> dict[str, Any]:
        """Return the score table of the last test: `lit.scores.score_table`."""
        experts = {
            task: outcomes
            for name, by_task in self.outcomes.items()
            for task, outcomes in by_task.items()
            if experts_of({name: self._models()[name]})
        }
        return score_table(self.outcomes, experts=experts, seed=self.seed)

    def _merged(self, pending: PendingMerge, observers: Sequence[MergeObserver]) -> Merged:
        merged = merge_calibrated(
            pending.experts,
            pending.method,
            self._images(pending) if pending.images is None else pending.images,
            backbone=copy.deepcopy(self.backbone).to(self.trainer.strategy.root_device),
            config=pending.config,
            veneers=pending.veneers,
            batch_norm=pending.batch_norm,
            observers=observers,
            seed=pending.seed,
        )
        if self.trainer.world_size == 1:
            return merged
        # Processors may differ in rounding from one machine to the next.
        return self.trainer.strategy.broadcast(merged)

    def _images(self, pending: PendingMerge) -> ImagesBySplit:
        """Return the images that `merge_files` would look at and calibrate on."""
        needed = splits_needed(
            pending.method, pending.batch_norm, pending.experts.structure, pending.veneers
        )
        return images_by_split(self._data().task_data, needed, seed=pending.seed)

    def _log_table(self, name: str, table: Mapping[str, Any]) -> None:
        # Every process holds the same numbers; `sync_dist` keeps Lightning from warning of it.
        mean = {measure: table["mean"][measure] for measure in _LOGGED}
        # A measure that is None, such as the loss among logits that are not finite, has no row.
        values = {f"{key}/{name}": value for key, value in mean.items() if value is not None}
        values |= {
            f"accuracy/{name}/{task}": row["accuracy"] for task, row in table["tasks"].items()
        }
        self.log_dict(values, sync_dist=True)

    def _models(self) -> dict[str, Model]:
        """Return the models, which are merged by now."""
        return cast("dict[str, Model]", self.models)

    def _cell(self, model: str, task: int) -> int:
        return list(self.models).index(model) * len(self._data().task_data) + task

    def _data(self) -> MergeDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MergeDataModule):
            raise TypeError(
                f"MergeModule must be tested on a MergeDataModule, but got {type(data).__name__}. "
                "Call trainer.test(module, datamodule=MergeDataModule(...))."
            )
        return data
