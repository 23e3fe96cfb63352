"""This file is one pass through several networks of one shape: their losses, and gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy


def stacked_losses(
    networks: Sequence[nn.Module], images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> list[Tensor]:
    """Return the loss of each network on its own batch, all of them computed in one pass.

    L_m = mean_i cross_entropy(f(theta_m, x_mi), y_mi)

    Equal to one pass each but for the rounding of sums. What a forward pass changes, such as
    BatchNorm's running statistics, is changed in each network. The gradients are computed along:
    `backward` of a loss hands out those of its network.

    Args:
        networks: M modules of one architecture, in one mode; of the first the code is run.
        images: inputs, (M, B, ...).
        labels: labels, (M, B).
        label_smoothing: share of the label's mass spread over all classes, in [0, 1).

    Raises:
        RuntimeError: a layer draws at random, or cannot be stacked.
    """
    first = networks[0]
    own = [dict(network.named_parameters()) for network in networks]
    kept = [dict(network.named_buffers()) for network in networks]
    params, buffers = _stacked(own), _stacked(kept)

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(first, (params, buffers), (x,))
        return cross_entropy(logits.float(), y, label_smoothing=label_smoothing)

    moved = {name: params[name].requires_grad_() for name, p in own[0].items() if p.requires_grad}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap
        losses = vmap(loss)(params, buffers, images, labels)
        gradients = torch.autograd.grad(losses.sum(), list(moved.values()), allow_unused=True)
    for name, tensor in buffers.items():
        for one, row in zip(kept, tensor.unbind(), strict=True):
            one[name].copy_(row)
    rows = [[None] * len(networks) if g is None else g.unbind() for g in gradients]
    return [
        _Known.apply(value, [row[place] for row in rows], *(each[name] for name in moved))
        for place, (value, each) in enumerate(zip(losses.detach().unbind(), own, strict=True))
    ]


def _stacked(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors of all networks by name, (M, *s), detached."""
    return {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        """Return the loss, of the parameters that follow."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        """Return the gradients, times what the loss was multiplied by."""
        scaled = (None if g is None else g * scale for g in ctx.gradients)
        return None, None, *scaled
