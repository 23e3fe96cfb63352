"""This file is passes over all images of a split without a gradient: features, scores ..."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergekit_lit.core.seeds import generator
from mergekit_lit.core.threads import one_thread
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


def pixels(backbone: Backbone, x: Tensor) -> Tensor:
    """Return uint8 images (B, H, W, 3) as inputs in channels-last memory: faster convolutions."""
    return inputs(backbone, x).contiguous(memory_format=torch.channels_last)


@one_thread()
def statistics_of(
    backbone: Backbone, pools: Images | Sequence[Images], *, seed: int = 0
) -> dict[str, Tensor]:
    """Return the BatchNorm statistics of all images of all pools; the backbone is left as it is.

    The images come in one seeded random order, in batches whose sizes differ by at most one: a
    batch of neighbours would show fewer classes, and so less variance, than training does. The head
    fit, the expert's file and every re-estimation call this, so that they treat BatchNorm alike,
    with one thread, so that they find the same to the last bit.

    Args:
        backbone: the model, on the device to compute on.
        pools: images, or several sets of them, which every batch mixes.
        seed: of the order.

    Returns:
        Statistics by name, on the CPU; empty without BatchNorm.
    """
    several = [pools] if isinstance(pools, Images) else list(pools)
    found = estimate_statistics(backbone, _shuffled(backbone, several, seed))
    return {name: tensor.cpu() for name, tensor in found.items()}


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
        yield pixels(backbone, x.to(device)), y.to(device)


def _shuffled(backbone: Backbone, pools: Sequence[Images], seed: int) -> Iterator[Tensor]:
    """Yield the images of all pools in one seeded order, each batch a mixture of the pools."""
    device = next(backbone.parameters()).device
    first = np.cumsum([0, *(len(pool) for pool in pools)])
    order = torch.randperm(int(first[-1]), generator=generator(seed, "statistics")).numpy()
    # Sizes that differ by at most one: a last batch of one image would have no variance.
    for part in np.array_split(order, -(-len(order) // _PASS_BATCH)):
        # In the order in which they lie on the disk.
        places = np.split(np.sort(part), np.searchsorted(np.sort(part), first[1:-1]))
        chosen = [
            pool.x[place - start]
            for pool, place, start in zip(pools, places, first, strict=False)
            if len(place)
        ]
        yield torch.cat([pixels(backbone, torch.from_numpy(x).to(device)) for x in chosen])
