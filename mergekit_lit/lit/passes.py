"""This file is passes over all images of a split without a gradient: features, scores ..."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergekit_lit.core.seeds import generator
from mergekit_lit.data.batches import EvalLoader
from mergekit_lit.data.splits import Images
from mergekit_lit.data.transforms import to_input
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.statistics import estimate_statistics

# Large enough to keep the cores busy, small enough for a laptop's memory at 224 px.
_PASS_BATCH = 256


@dataclass(frozen=True)
class Score:
    """How a model does on one split.

    Attributes:
        loss: mean cross-entropy, natural logarithm; None for an empty split.
        accuracy: share right, in [0, 1]; None for an empty split.
    """

    loss: float | None
    accuracy: float | None


def inputs(backbone: Backbone, x: Tensor) -> Tensor:
    """Return uint8 images (B, H, W, 3) as what the backbone takes, in its dtype."""
    return to_input(
        x,
        mean=backbone.mean,
        std=backbone.std,
        size=backbone.image_size,
        dtype=next(backbone.parameters()).dtype,
    )


def statistics_of(backbone: Backbone, images: Images) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of all `images`; the backbone is left as it is.

    The images come in one seeded random order, in batches whose sizes differ by at most one: a
    batch of neighbours would show fewer classes, and so less variance, than training does.
    """
    return estimate_statistics(backbone, _shuffled(backbone, images))


@torch.no_grad()
def features_of(backbone: Backbone, images: Images) -> tuple[Tensor, Tensor]:
    """Return the features (N, d) and labels (N,) of all images, on the CPU, in their order."""
    features, labels = [], []
    for x, y in _in_order(backbone, images):
        features.append(backbone(x).float().cpu())
        labels.append(y.cpu())
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def score(backbone: Backbone, head: nn.Module, images: Images) -> Score:
    """Return mean cross-entropy and accuracy over all images, accumulated in float64."""
    if len(images) == 0:
        return Score(None, None)
    loss, right = 0.0, 0
    for x, y in _in_order(backbone, images):
        logits = head(backbone(x)).float()
        loss += float(cross_entropy(logits, y, reduction="none").double().sum())
        right += int((logits.argmax(1) == y).sum())
    return Score(loss / len(images), right / len(images))


def _in_order(backbone: Backbone, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(backbone.parameters()).device
    for x, y, _ in EvalLoader(images, batch=_PASS_BATCH):
        yield inputs(backbone, x.to(device)), y.to(device)


def _shuffled(backbone: Backbone, images: Images) -> Iterator[Tensor]:
    device = next(backbone.parameters()).device
    order = torch.randperm(len(images), generator=generator(0, "statistics")).numpy()
    for part in np.array_split(order, -(-len(order) // _PASS_BATCH)):
        yield inputs(backbone, torch.from_numpy(images.x[np.sort(part)]).to(device))
