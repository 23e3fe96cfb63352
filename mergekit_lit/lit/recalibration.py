"""This file is BatchNorm recalibration: statistics estimated again on a task's training images."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lit.core.experts import Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.seeds import generator
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.passes import inputs
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.statistics import estimate_statistics, has_statistics

CALIBRATION_IMAGES = 512

# Large enough that each batch shows most classes of its task.
_BATCH = 128


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
            task: statistics_on([pool], merged.shared, backbone=backbone, seed=seed)
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
        Statistics by name, on the backbone's device; empty without BatchNorm.
    """
    module = copy.deepcopy(backbone)
    module.load_state_dict(dict(params))
    return estimate_statistics(module, _batches(module, pools, seed))


def calibration_images(
    train: Images, task: str, *, count: int = CALIBRATION_IMAGES, seed: int = 0
) -> Images:
    """Return at most `count` of a task's training images, drawn by `seed`, in their order."""
    positions = torch.randperm(len(train), generator=generator(seed, "calibration", task))[:count]
    return train.subset(positions.sort().values.numpy())


def _pool(task: str, images: Mapping[str, Images]) -> Images:
    if task not in images:
        raise KeyError(unknown_name("task with images", task, images))
    if len(images[task]) < 2:
        raise ValueError(
            f"Task {task!r} must have at least 2 images to estimate statistics on, but has "
            f"{len(images[task])}."
        )
    return images[task]


def _batches(backbone: Backbone, pools: Sequence[Images], seed: int) -> Iterator[Tensor]:
    """Yield the images of all pools in one seeded order, each batch a mixture of the pools."""
    device = next(backbone.parameters()).device
    owner = torch.repeat_interleave(torch.tensor([len(pool) for pool in pools]))
    place = torch.cat([torch.arange(len(pool)) for pool in pools])
    order = torch.randperm(len(owner), generator=generator(seed, "recalibrate"))
    # Sizes that differ by at most one: a last batch of one image would have no variance.
    for batch in order.tensor_split(-(-len(order) // _BATCH)):
        parts = [place[batch[owner[batch] == t]].numpy() for t in range(len(pools))]
        chosen = [pool.x[part] for pool, part in zip(pools, parts, strict=True) if len(part)]
        yield torch.cat([inputs(backbone, torch.from_numpy(x).to(device)) for x in chosen])
