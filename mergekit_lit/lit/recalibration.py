"""This file is BatchNorm recalibration: statistics estimated again on a task's training images."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast, get_args

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS, unknown_name
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.structure import Structure
from mergekit_lit.data.splits import Images, TaskData
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.passes import statistics_of
from mergekit_lit.merging.engine import merge
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.statistics import has_statistics

ImagesBySplit: TypeAlias = Mapping[DataSplit, Mapping[str, Images]]
"""Images of each task, by split."""

CALIBRATION_IMAGES = 4096
"""Largest number of a task's training images that BatchNorm statistics are estimated on.

The head fit, the expert's file, recalibration and evaluation share it: up to so many images all of
them count, beyond it a subset does, the same everywhere, so that a large task costs no more.
"""


def merge_calibrated(
    experts: Experts,
    method: str,
    images: ImagesBySplit,
    *,
    backbone: Backbone,
    config: Mapping[str, Any] | None = None,
    batch_norm: BatchNormPolicy = "base",
    observers: Sequence[MergeObserver] = (),
    seed: int = 0,
) -> Merged:
    """Merge in memory, by any method under any policy; nothing is read from or written to disk.

    Args:
        experts: T experts of one base.
        method: name of a registered method.
        images: images of each task: of `train` for the `recalibrate` policies, and of the split
            that the method declares, if it looks at any; `splits_needed` names them.
        backbone: a module of the experts' architecture; never changed.
        config: values for the method's parameters; the others keep their defaults.
        batch_norm: the `base`'s statistics, the `average` of the experts', or estimated again on
            the images of all tasks together (`recalibrate`) or of each (`recalibrate-per-task`).
        observers: see every tensor's deltas.
        seed: of methods that draw at random, and of the images' order.

    Raises:
        KeyError: unknown method, parameter or policy, or a task without images.
        TypeError: a parameter of the wrong type.
        ValueError: a value out of range, or no images for a method that looks at some.
    """
    if batch_norm not in get_args(BatchNormPolicy):
        raise KeyError(unknown_name("BatchNorm policy", batch_norm, get_args(BatchNormPolicy)))
    later = batch_norm.startswith("recalibrate")
    merged = merge(
        experts,
        method,
        config=config,
        batch_norm="base" if later else batch_norm,
        observers=observers,
        seed=seed,
        calibration=_calibration(experts, method, images, backbone, batch_norm),
    )
    if not later:
        return merged
    per_task = batch_norm == "recalibrate-per-task"
    train = images.get("train", {})
    return recalibrate(merged, train, backbone=backbone, per_task=per_task, seed=seed)


def splits_needed(
    method: str, batch_norm: BatchNormPolicy, structure: Structure
) -> tuple[DataSplit, ...]:
    """Return the splits of which `merge_calibrated` needs images.

    Raises:
        KeyError: unknown method.
    """
    declared = _declared_split(method)
    again = batch_norm.startswith("recalibrate") and has_statistics(structure)
    needed = (["train"] if again else []) + ([declared] if declared else [])
    return tuple(dict.fromkeys(cast("list[DataSplit]", needed)))


def images_by_split(
    tasks: Iterable[TaskData],
    splits: Iterable[DataSplit],
    *,
    count: int = CALIBRATION_IMAGES,
    seed: int = 0,
) -> dict[DataSplit, dict[str, Images]]:
    """Return at most `count` images of each task, drawn by `seed`, of each of the splits."""
    found: dict[DataSplit, dict[str, Images]] = {split: {} for split in splits}
    for task in tasks:
        whole = {"train": task.train, "val": task.val, "test-unlabelled": task.test}
        for split, chosen in found.items():
            chosen[task.name] = calibration_images(whole[split], task.name, count=count, seed=seed)
    return found


def recalibrate(
    merged: Merged,
    images: Mapping[str, Images],
    *,
    backbone: Backbone,
    per_task: bool,
    seed: int = 0,
) -> Merged:
    """Estimate BatchNorm statistics of a merged model again, on unlabelled training images.

    Args:
        merged: the model; never changed. Without BatchNorm it is returned with the same tensors.
        images: images of each task of `merged`; labels are not looked at.
        backbone: a module of the architecture; never changed.
        per_task: statistics for each task, from its images alone; else one set, from all images.
        seed: of the order of the images.

    Raises:
        KeyError: a task has no entry in `images`.
        ValueError: a task has fewer than 2 images.
    """
    policy = "recalibrate-per-task" if per_task else "recalibrate"
    facts = {**merged.facts, "batch_norm": policy}
    if not has_statistics(merged.structure):
        return replace(merged, facts=facts)
    pools = {task: _pool(task, images) for task in merged.tasks}
    if per_task:
        statistics = {
            task: statistics_on([pool], merged.for_task(task), backbone=backbone, seed=seed)
            for task, pool in pools.items()
        }
        return replace(merged, statistics=statistics, facts=facts)
    pooled = statistics_on(list(pools.values()), merged.shared, backbone=backbone, seed=seed)
    return replace(merged, shared={**merged.shared, **pooled}, statistics={}, facts=facts)


def statistics_on(
    pools: Sequence[Images], params: Params, *, backbone: Backbone, seed: int = 0
) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of a model on the images of all pools together.

    Args:
        pools: images; each batch is a mixture of the pools.
        params: every tensor of the model's backbone.
        backbone: a module of the architecture, on the device to compute on; never changed.
        seed: of the order of the images.

    Returns:
        Statistics by name, on the CPU; empty without BatchNorm.
    """
    if not any(name.endswith("running_mean") for name in params):
        return {}
    module = copy.deepcopy(backbone).eval()
    module.load_state_dict(dict(params))
    return statistics_of(module, pools, seed=seed)


def task_statistics(backbone: Backbone, data: TaskData) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of a backbone on one task, as the head fit takes them.

    They are a function of the weights and the training images alone: the same for the head fit,
    the expert's file and the evaluation of a base or an expert.
    """
    return statistics_of(backbone, calibration_images(data.train, data.name))


def calibration_images(
    train: Images, task: str, *, count: int = CALIBRATION_IMAGES, seed: int = 0
) -> Images:
    """Return at most `count` of a task's training images, drawn by `seed`, in their order."""
    if len(train) <= count:
        return train
    positions = torch.randperm(len(train), generator=generator(seed, "calibration", task))[:count]
    return train.subset(positions.sort().values.numpy())


def _calibration(
    experts: Experts,
    method: str,
    images: ImagesBySplit,
    backbone: Backbone,
    batch_norm: BatchNormPolicy,
) -> Calibration | None:
    split = _declared_split(method)
    if split is None or split not in images:
        return None
    return calibration_on(
        images[split], experts, backbone=backbone, split=split, batch_norm=batch_norm
    )


def _declared_split(method: str) -> DataSplit | None:
    """Return the split that a method looks at images of, if any."""
    declared = MERGE_METHODS.get(method).facts.get("data")
    return cast("DataSplit", declared) if declared in get_args(DataSplit) else None


def _pool(task: str, images: Mapping[str, Images]) -> Images:
    if task not in images:
        raise KeyError(unknown_name("task with images", task, images))
    if len(images[task]) < 2:
        raise ValueError(
            f"Task {task!r} must have at least 2 images to estimate statistics on, but has "
            f"{len(images[task])}."
        )
    return images[task]
