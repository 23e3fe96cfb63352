"""This file scores candidates: one module stands in for each of them in turn."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.adapters import adapted
from mergekit_lit.core.experts import Expert, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.data.batches import gather
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.passes import pixels
from mergekit_lit.lit.scores import Outcomes, no_outcomes, outcomes_of
from mergekit_lit.lit.suite_data import split_images
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.heads import apply_head
from mergekit_lit.stages.evaluate import evaluate_models

_BATCH = 256


class Scorer:
    """Scores merged models on validation images, never on test images.

    Weights are copied into one module, which is built, placed and compiled once for all candidates.
    A task whose model differs in some tensors alone (statistics, masks) has those copied alone.
    """

    def __init__(
        self, backbone: Backbone, tasks: Sequence[TaskData], *, compiled: bool = False
    ) -> None:
        """Make the module.

        Args:
            backbone: the architecture, on the device to compute on; never changed.
            tasks: the tasks with their validation images.
            compiled: whether to compile the module: slow to start, fast for many large candidates.

        Raises:
            ValueError: a task has no validation image.
        """
        self._images = {task.name: split_images(task, "val") for task in tasks}
        module = copy.deepcopy(backbone).eval().requires_grad_(requires_grad=False)
        self._module = module.to(memory_format=torch.channels_last)
        self._forward: Any = torch.compile(self._module) if compiled else self._module
        self._slots = self._module.state_dict()
        self._held: dict[str, Tensor] = {}

    @property
    def labels(self) -> dict[str, Any]:
        """Labels of each task's validation images, (N,)."""
        return {task: images.y for task, images in self._images.items()}

    def outcomes(
        self, merged: Merged, positions: Mapping[str, Tensor] | None = None
    ) -> dict[str, Outcomes]:
        """Return what a model does on validation images of each task.

        Args:
            merged: the model, with the BatchNorm statistics and heads that it is to have.
            positions: places of the images by task, (n,); all images by default.
        """
        if positions is None:
            positions = {task: torch.arange(len(i)) for task, i in self._images.items()}
        return {task: self._on_task(merged, task, places) for task, places in positions.items()}

    @torch.inference_mode()
    def _on_task(self, merged: Merged, task: str, places: Tensor) -> Outcomes:
        device = next(iter(self._slots.values())).device
        self._take(merged.for_task(task))
        head = _on(merged.heads[task], device)
        adapter = _on(merged.adapters.get(task, {}), device)
        found = [no_outcomes(torch.device("cpu"))]
        for part in torch.split(places, _BATCH) if len(places) else ():
            x, y, _ = gather(self._images[task], part)
            features = self._forward(pixels(self._module, x.to(device)))
            outcomes = outcomes_of(apply_head(head, adapted(adapter, features)), y.to(device))
            found.append(Outcomes(*(each.cpu() for each in vars(outcomes).values())))
        fields = zip(*(vars(outcomes).values() for outcomes in found), strict=True)
        return Outcomes(*(torch.cat(each) for each in fields))

    def _take(self, params: Params) -> None:
        """Copy a model's tensors into the module, but for those that it holds already."""
        for name, slot in self._slots.items():
            if self._held.get(name) is not params[name]:
                slot.copy_(params[name])
                self._held[name] = params[name]


def expert_rows(
    backbone: Backbone, experts: Sequence[Expert], tasks: Sequence[TaskData]
) -> dict[str, Any]:
    """Return the scores of each task's own expert on val, under the statistics of its file."""
    models = {"experts": experts}
    table = evaluate_models(backbone, models, tasks, split="val", batch_norm="stored")
    return dict(table["experts"]["tasks"])


def _on(params: Params, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on a device, in single precision."""
    return {name: tensor.to(device).float() for name, tensor in params.items()}
