"""This file is the evaluation itself: a base, an expert or a merge on the images of one task.

One implementation: `MergeModule` calls it under a Trainer, `stages.evaluate` in a plain loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.func import functional_call

from mergekit_lit.core.adapters import adapted
from mergekit_lit.core.experts import Base, Expert, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.specs import check_same_names_and_shapes
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.recalibration import calibration_images, statistics_on
from mergekit_lit.lit.scores import Outcomes, outcomes_of
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.heads import apply_head

Model: TypeAlias = Base | Expert | Merged | Sequence[Expert]
"""What can be evaluated. Experts are evaluated on their own tasks alone."""

EvaluationBatchNorm = Literal["stored", "recalibrate-per-task"]
"""Statistics of base and experts: their own, or estimated on the task's training images."""


@dataclass(frozen=True)
class Entry:
    """One model on one task, ready to run.

    Attributes:
        model: its name.
        task: name of the task.
        params: every tensor of the backbone.
        head: `weight` (C, d) and `bias` (C,).
        adapter: what stands between them, as `core.adapters` has it; empty for nothing.
    """

    model: str
    task: str
    params: Params
    head: Params
    adapter: Params = field(default_factory=dict)


def predict(backbone: Backbone, entry: Entry, inputs: Tensor) -> Tensor:
    """Return the logits (B, C) of one model on inputs (B, 3, H, W); the backbone is untouched."""
    features = functional_call(backbone, dict(entry.params), (inputs,))
    return apply_head(entry.head, adapted(entry.adapter, features))


def observe(backbone: Backbone, entry: Entry, inputs: Tensor, labels: Tensor) -> Outcomes:
    """Return what one model does on each image of a batch.

    Raises:
        ValueError: a label is no class of the head.
    """
    classes = len(entry.head["weight"])
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        bad = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise ValueError(
            f"Labels of {entry.task!r} must lie in [0, {classes}), the classes of the head of "
            f"{entry.model!r}, but one is {bad}. Evaluate on the data that the head was made for."
        )
    return outcomes_of(predict(backbone, entry, inputs), labels)


def entries_for(
    models: Mapping[str, Model],
    data: TaskData,
    backbone: Backbone,
    *,
    heads: Mapping[str, Params],
    batch_norm: EvaluationBatchNorm = "stored",
) -> list[Entry]:
    """Return every model that is to be evaluated on one task, on the device of the backbone.

    Args:
        models: models by name.
        data: the task; its training images are used by `recalibrate-per-task`.
        backbone: the architecture; its own values are not used.
        heads: head of each task, for bases.
        batch_norm: statistics of bases and experts. Merged models carry theirs.

    Raises:
        KeyError: no head for the task, or an unknown policy.
        ValueError: a model or head does not fit the backbone or the task.
    """
    if batch_norm not in get_args(EvaluationBatchNorm):
        raise KeyError(unknown_name("BatchNorm policy", batch_norm, get_args(EvaluationBatchNorm)))
    entries = []
    for name, model in models.items():
        found = _parts(name, model, data.name, heads)
        if found is None:
            continue
        params, head = (floats(part) for part in found)
        _check_fit(name, params, head, data, backbone)
        if batch_norm == "recalibrate-per-task" and not isinstance(model, Merged):
            params |= _recalibrated(backbone, params, data)
        device = next(backbone.parameters()).device
        adapter = model.adapters.get(data.name, {}) if isinstance(model, Merged) else {}
        parts = (_on(part, device) for part in (params, head, adapter))
        entries.append(Entry(name, data.name, *parts))
    return entries


def heads_of(models: Mapping[str, Model]) -> dict[str, Params]:
    """Return a head for each task, for bases: the expert's, else what a merge kept of it."""
    heads: dict[str, Params] = {}
    for model in models.values():
        if isinstance(model, Merged):
            heads |= {task: head for task, head in model.heads.items() if task not in heads}
    for expert in experts_of(models):
        heads[expert.name] = expert.head
    return heads


def experts_of(models: Mapping[str, Model]) -> list[Expert]:
    """Return every expert among the models, in their order."""
    found: list[Expert] = []
    for model in models.values():
        if isinstance(model, Expert):
            found.append(model)
        elif not isinstance(model, Base | Merged):
            found.extend(model)
    return found


def _parts(
    name: str, model: Model, task: str, heads: Mapping[str, Params]
) -> tuple[Params, Params] | None:
    """Return a model's backbone and head for a task; None for an expert of another task."""
    if isinstance(model, Base):
        return model.params, _head(name, heads, task)
    if isinstance(model, Merged):
        return model.for_task(task), _head(name, model.heads, task)
    experts = [model] if isinstance(model, Expert) else model
    own = [expert for expert in experts if expert.name == task]
    return (own[0].backbone, own[0].head) if own else None


def _head(name: str, heads: Mapping[str, Params], task: str) -> Params:
    if not heads.get(task):
        known = ", ".join(sorted(task for task in heads if heads[task])) or "none"
        raise KeyError(
            f"Model {name!r} needs a head for task {task!r}, but there are heads for: {known}. "
            "Evaluate that task's expert along with it, or leave the task out."
        )
    return heads[task]


def _check_fit(name: str, params: Params, head: Params, data: TaskData, backbone: Backbone) -> None:
    check_same_names_and_shapes(params, backbone.state_dict(), source=f"Model {name!r}")
    wanted = (len(data.classes), backbone.features)
    if tuple(head["weight"].shape) != wanted:
        raise ValueError(
            f"The head of {name!r} for {data.name!r} must have shape {wanted} (classes of the "
            f"task, features of the backbone), but has {tuple(head['weight'].shape)}."
        )


def _recalibrated(backbone: Backbone, params: Params, data: TaskData) -> dict[str, Tensor]:
    """Return BatchNorm statistics as the head fit estimates them; empty without BatchNorm."""
    return statistics_on([calibration_images(data.train, data.name)], params, backbone=backbone)


def _on(params: Params, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on a device, filters in channels-last memory like the images."""
    formats = {4: torch.channels_last}
    return {
        name: tensor.to(device, memory_format=formats.get(tensor.dim(), torch.preserve_format))
        for name, tensor in params.items()
    }
