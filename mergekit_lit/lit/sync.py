"""This file is what processes share: BatchNorm over all of them, for any layer, and means."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncedBatchNorm(LayerSync):
    """Normalises by the statistics of the whole batch, whichever process holds which part of it.

    torch's SyncBatchNorm refuses the CPU, and replaces layers: those of timm that also apply an
    activation would lose it. This plugin leaves the layers and their names as they are.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Let every BatchNorm layer of `model` share its statistics while it trains."""
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                vars(layer)["forward"] = _synced(layer, layer.forward)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `apply`."""
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                vars(layer).pop("forward", None)
        return model


def means_over_processes(tensors: Sequence[Tensor], strategy: Strategy) -> list[Tensor]:
    """Return the mean of each tensor over all processes, in one message for all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    mean = cast("Tensor", strategy.reduce(flat, reduce_op="mean"))
    parts = torch.split(mean, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _synced(layer: _BatchNorm, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward that takes the statistics of all processes while the layer trains."""

    def forward(x: Tensor) -> Tensor:
        if not layer.training or dist.get_world_size() == 1:
            return plain(x)
        mean, variance = _statistics(x)
        _track(layer, mean.detach(), variance.detach(), x.numel() // x.shape[1])
        y = _normalised(x, mean, variance, layer)
        for name in ("drop", "act"):
            y = getattr(layer, name)(y) if hasattr(layer, name) else y
        return y

    return forward


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) over all processes, which hold parts of equal size."""
    wide = x.float().transpose(0, 1).flatten(1)
    mean = _mean_over_processes(wide.mean(1))
    return mean, _mean_over_processes((wide - mean.unsqueeze(1)).square().mean(1))


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 (torch's signature)
        """Return the mean."""
        return _mean(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 (torch's signature)
        """Return the mean of the gradients: every process's loss depends on this one's part."""
        return _mean(gradients[0])


def _mean_over_processes(x: Tensor) -> Tensor:
    return cast("Tensor", cast("Any", _MeanOverProcesses).apply(x))


def _mean(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def _track(layer: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics as the layer itself would."""
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    share = layer.momentum
    if share is None:
        share = 1 / int(layer.num_batches_tracked or 1)
    total = count * dist.get_world_size()
    layer.running_mean.lerp_(mean, share)
    layer.running_var.lerp_(variance * total / (total - 1), share)


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, layer: _BatchNorm) -> Tensor:
    """Return w (x - mean) / sqrt(variance + eps) + b."""
    scale = (variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)
