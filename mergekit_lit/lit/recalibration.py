"""This file is BatchNorm recalibration: statistics estimated again on a task's training images."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, unknown_name
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.structure import Structure
from mergekit_lit.data.splits import Images, TaskData
from mergekit_lit.merging.engine import merge
from mergekit_lit.models.statistics import has_statistics

if TYPE_CHECKING:
    from mergekit_lit.models.backbones import Backbone

ImagesBySplit: TypeAlias = Mapping[DataSplit, Mapping[str, Images]]
"""Images of each task, by split."""

Veneers: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]
"""Names of veneers and values for their parameters, as `merging.engine.merge` takes them."""

CALIBRATION_IMAGES = 4096
"""Largest number of a task's training images that BatchNorm statistics are estimated on.

The head fit, the expert's file, recalibration and evaluation share it: up to so many images all of
them count, beyond it a subset does, the same everywhere, so that a large task costs no more.
"""

ONE_SET = (
    "`batch_norm` 'recalibrate' makes one set of statistics for one model, but this merge makes "
    "each task a model of its own. Use 'recalibrate-per-task'."
)
"""Why that policy is refused to methods that make each task a model of its own."""


# What `merging.engine.merge` takes, and images with the network to look at them.
def merge_calibrated(  # noqa: PLR0913
    experts: Experts,
    method: str,
    images: ImagesBySplit,
    *,
    backbone: "Backbone | None",
    config: Mapping[str, Any] | None = None,
    veneers: Veneers = (),
    batch_norm: BatchNormPolicy = "base",
    observers: Sequence[MergeObserver] = (),
    seed: int = 0,
    dtype: str | None = None,
    out_dtype: str = "base",
    streamed: bool = False,
) -> Merged:
    """Merge in memory, by any method under any policy; nothing is read from or written to disk.

    Args:
        experts: T experts of one base.
        method: name of a registered method.
        images: images of each task: of `train` for the `recalibrate` policies, and of the split
            that method and veneers declare, if they look at any; `splits_needed` names them.
        backbone: a module of the experts' architecture; never changed. None where no images are
            looked at.
        config: values for the method's parameters; the others keep their defaults.
        veneers: names and configs of veneers, as the engine takes them.
        batch_norm: the `base`'s statistics, the `average` of the experts', or estimated again on
            the images of all tasks together (`recalibrate`) or of each (`recalibrate-per-task`).
        observers: see every tensor's deltas.
        seed: of methods that draw at random, and of the images' order.
        dtype: number type of the computation, as the engine takes it.
        out_dtype: number type of the result, as the engine takes it.
        streamed: make each tensor when it is asked for, where no statistics are recalibrated.

    Raises:
        KeyError: unknown method, parameter or policy, or a task without images.
        TypeError: a parameter of the wrong type.
        ValueError: a value out of range, or no images for a method that looks at some.
    """
    if batch_norm not in get_args(BatchNormPolicy):
        raise KeyError(unknown_name("BatchNorm policy", batch_norm, get_args(BatchNormPolicy)))
    later = batch_norm.startswith("recalibrate")
    splits = [split for split in declared_splits(method, veneers) if split in images]
    calibrations = _calibrations(experts, images, splits, backbone, batch_norm) if splits else None
    merged = merge(
        experts,
        method,
        config=config,
        veneers=veneers,
        batch_norm="base" if later else batch_norm,
        observers=observers,
        seed=seed,
        calibration=calibrations,
        dtype=dtype,
        out_dtype=out_dtype,
        streamed=streamed and not (later and has_statistics(experts.structure)),
    )
    if not later:
        return merged
    per_task = batch_norm == "recalibrate-per-task"
    train = images.get("train", {})
    return recalibrate(merged, train, backbone=backbone, per_task=per_task, seed=seed)


def splits_needed(
    method: str, batch_norm: BatchNormPolicy, structure: Structure, veneers: Veneers = ()
) -> tuple[DataSplit, ...]:
    """Return the splits of which `merge_calibrated` needs images.

    Raises:
        KeyError: unknown method or veneer.
    """
    again: list[DataSplit] = (
        ["train"] if batch_norm.startswith("recalibrate") and has_statistics(structure) else []
    )
    return tuple(dict.fromkeys([*again, *declared_splits(method, veneers)]))


def declared_splits(method: str, veneers: Veneers = ()) -> list[DataSplit]:
    """Return the splits that a method and veneers look at images of.

    Raises:
        KeyError: unknown method or veneer.
    """
    entries = [MERGE_METHODS.get(method), *(VENEERS.get(name) for name, _ in veneers)]
    declared = dict.fromkeys(entry.facts.get("data") for entry in entries)
    return cast("list[DataSplit]", [split for split in declared if split in get_args(DataSplit)])


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
    backbone: "Backbone | None",
    per_task: bool,
    seed: int = 0,
) -> Merged:
    """Estimate BatchNorm statistics of a merged model again, on unlabelled training images.

    Args:
        merged: the model; never changed. Without BatchNorm it is returned with the same tensors.
        images: images of each task of `merged`; labels are not looked at.
        backbone: a module of the architecture; never changed. None where there is no BatchNorm.
        per_task: statistics for each task, from its images alone; else one set, from all images.
        seed: of the order of the images.

    Raises:
        KeyError: a task has no entry in `images`.
        ValueError: a task has fewer than 2 images; or one set of statistics is asked for a merge
            that makes each task a model of its own.
    """
    if (merged.masks or merged.own) and not per_task:
        raise ValueError(ONE_SET)
    policy = "recalibrate-per-task" if per_task else "recalibrate"
    facts = {**merged.facts, "batch_norm": policy}
    if not has_statistics(merged.structure):
        return replace(merged, facts=facts)
    module = copy.deepcopy(_given(backbone)).eval()
    pools = {task: _pool(task, images) for task in merged.tasks}
    if per_task:
        statistics = {
            task: _estimated(module, merged.for_task(task), [pool], seed)
            for task, pool in pools.items()
        }
        return replace(merged, statistics=statistics, facts=facts)
    pooled = _estimated(module, merged.shared, list(pools.values()), seed)
    return replace(merged, shared={**merged.shared, **pooled}, statistics={}, facts=facts)


def statistics_on(
    pools: Sequence[Images], params: Params, *, backbone: "Backbone", seed: int = 0
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
    return _estimated(copy.deepcopy(backbone).eval(), params, pools, seed)


def task_statistics(backbone: "Backbone", data: TaskData) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of a backbone on one task, as the head fit takes them.

    They are a function of the weights and the training images alone: the same for the head fit,
    the expert's file and the evaluation of a base or an expert.
    """
    from mergekit_lit.lit.passes import statistics_of

    return statistics_of(backbone, calibration_images(data.train, data.name))


def calibration_images(
    train: Images, task: str, *, count: int = CALIBRATION_IMAGES, seed: int = 0
) -> Images:
    """Return at most `count` of a task's training images, drawn by `seed`, in their order."""
    if len(train) <= count:
        return train
    positions = torch.randperm(len(train), generator=generator(seed, "calibration", task))[:count]
    return train.subset(positions.sort().values.numpy())


def _calibrations(
    experts: Experts,
    images: ImagesBySplit,
    splits: Iterable[DataSplit],
    backbone: "Backbone | None",
    batch_norm: BatchNormPolicy,
) -> list[Calibration]:
    """Return what methods and veneers that look at images of these splits are given."""
    from mergekit_lit.lit.calibration import calibration_on

    return [
        calibration_on(
            images[split],
            experts,
            backbone=_given(backbone),
            split=split,
            batch_norm=batch_norm,
        )
        for split in splits
    ]


def _given(backbone: "Backbone | None") -> "Backbone":
    if backbone is None:
        raise ValueError("Looking at images needs the experts' `backbone`, but got none. Build it.")
    return backbone


def _estimated(
    module: "Backbone", params: Params, pools: Sequence[Images], seed: int
) -> dict[str, Tensor]:
    """Return the statistics of a model whose tensors are copied into the module."""
    from mergekit_lit.lit.passes import statistics_of

    module.load_state_dict(dict(params))
    return statistics_of(module, pools, seed=seed)


def _pool(task: str, images: Mapping[str, Images]) -> Images:
    if task not in images:
        raise KeyError(unknown_name("task with images", task, images))
    if len(images[task]) < 2:
        raise ValueError(
            f"Task {task!r} must have at least 2 images to estimate statistics on, but has "
            f"{len(images[task])}."
        )
    return images[task]
