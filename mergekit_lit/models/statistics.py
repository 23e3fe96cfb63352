"""This file is the re-estimation of BatchNorm statistics, for a head fit or after a merge."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
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
        backbone: as it was again when the statistics are returned.
        batches: normalised images, (b, 3, H, W) each, of equal size where all images should count
            alike.

    Returns:
        `running_mean` and `running_var` by their names in the state dict; empty without BatchNorm.

    Raises:
        ValueError: the backbone has BatchNorm and there is no batch.
    """
    layers = _tracking(backbone)
    if not layers:
        return {}
    with _averaging(backbone, layers.values()):
        count = 0
        for x in batches:
            backbone(x)
            count += 1
        if count == 0:
            raise ValueError("BatchNorm statistics need at least one batch, but there is none.")
        names = [f"{name}.{leaf}" for name in layers for leaf in ("running_mean", "running_var")]
        tensors = backbone.state_dict()
        return {name: tensors[name].clone() for name in sorted(names)}


@contextmanager
def _averaging(module: nn.Module, layers: Collection[Any]) -> Iterator[None]:
    """Let some layers average what they see, all others in evaluation mode; then put all back.

    A copy to work on would cost as much as a pass of a small ResNet over a hundred images.
    """
    modes = [(inner, inner.training) for inner in module.modules()]
    before = [
        (layer, layer.momentum, {name: buffer.clone() for name, buffer in layer.named_buffers()})
        for layer in layers
    ]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    try:
        yield
    finally:
        module.train(modes[0][1])  # a module may have more to set than its parts
        for inner, mode in modes:
            inner.training = mode
        for layer, momentum, buffers in before:
            layer.momentum = momentum
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)


def _tracking(module: nn.Module) -> dict[str, Any]:
    """Return the BatchNorm layers that keep running statistics, by name."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}
