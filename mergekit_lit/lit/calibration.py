"""This file is calibration: what a merge method that looks at images is given, made of images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration, DataSplit
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.passes import inputs
from mergekit_lit.merging.engine import merge
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.capture import network
from mergekit_lit.models.heads import apply_head


@dataclass(frozen=True)
class TaskSamples:
    """The images of one task, normalised as a backbone takes them when asked for.

    Attributes:
        images: the images.
        backbone: tells size, mean, deviation and dtype of its input.
        labelled: whether batches carry the labels.
    """

    images: Images
    backbone: Backbone
    labelled: bool

    def __len__(self) -> int:
        return len(self.images)

    def take(self, positions: Tensor) -> Batch:
        """Return the images at `positions` (b,), in that order."""
        chosen = self.images.subset(positions.numpy())
        device = next(self.backbone.parameters()).device
        pixels = torch.from_numpy(chosen.x[:])
        labels = torch.as_tensor(chosen.y).to(device) if self.labelled else None
        return Batch(inputs(self.backbone, pixels.to(device)), labels)


def calibration_on(
    images: Mapping[str, Images],
    experts: Experts,
    *,
    backbone: Backbone,
    split: DataSplit,
    batch_norm: BatchNormPolicy = "base",
) -> Calibration:
    """Return what a data-using merge method is given.

    Args:
        images: images of each task of the experts; their labels are withheld where `split` is
            `test-unlabelled`.
        experts: what is merged.
        backbone: a module of their architecture; never changed.
        split: which images these are.
        batch_norm: where the merged model's BatchNorm statistics will come from. Methods look at it
            under the `base`'s or the `average` of the experts'; where they are to be recalibrated,
            under those of each batch, of all tasks together (`recalibrate`) or of one.

    Raises:
        KeyError: a task has no images.
        ValueError: a task has an empty set of images.
    """
    later = batch_norm.startswith("recalibrate")
    heads = {name: floats(head) for name, head in zip(experts.names, experts.heads, strict=True)}
    return Calibration(
        split=split,
        samples={
            name: TaskSamples(_of_task(name, images), backbone, split != "test-unlabelled")
            for name in experts.names
        },
        expert=network(backbone),
        merged=network(backbone, batch_statistics=later),
        logits=lambda task, features: apply_head(heads[task], features),
        statistics={} if later else _statistics(experts, batch_norm),
        pooled=batch_norm == "recalibrate",
        remade=lambda others: calibration_on(
            images, others, backbone=backbone, split=split, batch_norm=batch_norm
        ),
    )


def _of_task(name: str, images: Mapping[str, Images]) -> Images:
    if name not in images:
        raise KeyError(unknown_name("task with images", name, images))
    if len(images[name]) == 0:
        raise ValueError(f"Task {name!r} must have images for the merge to look at, but has none.")
    return images[name]


def _statistics(experts: Experts, batch_norm: str) -> Params:
    """Return the BatchNorm statistics that a merge of the experts gets by a policy."""
    shared = merge(experts, "average", batch_norm=batch_norm).shared
    return {name: t for name, t in shared.items() if experts.structure[name].kind == "statistic"}
