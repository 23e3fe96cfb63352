"""This file is the re-estimation of BatchNorm statistics, for a head fit or after a merge."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lit.core.structure import Structure

_BatchNorm = nn.modules.batchnorm._BatchNorm


def has_statistics(structure: Structure) -> bool:
    """Return whether the model keeps running statistics, as BatchNorm does."""
    return any(info.kind == "statistic" for info in structure.values())


@torch.no_grad()
def estimate_statistics(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the mean and variance that each BatchNorm layer sees on the given images.

    mean = (1/B) sum_i m_i,  var = (1/B) sum_i v_i over the B batches; m_i and v_i (unbiased) are
    those of batch i, as it reaches the layer when all layers before normalise by their own batch.

    Args:
        backbone: never changed.
        batches: normalised images, (b, 3, H, W) each, of equal size where all images should count
            alike.

    Returns:
        `running_mean` and `running_var` by their names in the state dict; empty without BatchNorm.

    Raises:
        ValueError: the backbone has BatchNorm and there is no batch.
    """
    if not _tracking(backbone):
        return {}
    probe = copy.deepcopy(backbone).eval()
    layers = _tracking(probe)
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    count = 0
    for x in batches:
        probe(x)
        count += 1
    if count == 0:
        raise ValueError("BatchNorm statistics need at least one batch, but there is none.")
    names = [f"{name}.{leaf}" for name in layers for leaf in ("running_mean", "running_var")]
    tensors = probe.state_dict()
    return {name: tensors[name].clone() for name in sorted(names)}


def _tracking(module: nn.Module) -> dict[str, Any]:
    """Return the BatchNorm layers that keep running statistics, by name."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}
