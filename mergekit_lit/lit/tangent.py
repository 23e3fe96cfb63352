"""This file is linearised fine-tuning: a model that is exactly linear in its displacement."""

import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergekit_lit.core.params import Params


class Tangent:
    """The tangent model at the point where training starts.

    Attributes:
        origin: theta_0, the parameters that move.
    """

    def __init__(self, start: nn.Module, *, memory: torch.memory_format) -> None:
        """Hold a starting point, its filters in the given memory format."""
        self.origin = {
            name: p.detach().to(memory_format=memory if p.dim() == 4 else torch.preserve_format)
            for name, p in start.named_parameters()
        }

    def __call__(self, model: Callable[[Params], Tensor], params: Params) -> Tensor:
        """Return the first-order expansion of a model at the starting point."""
        return linearised(model, self.origin, params)


def linearised(model: Callable[[Params], Tensor], origin: Params, params: Params) -> Tensor:
    """Return the first-order expansion of a model in its parameters.

    f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

    Gradients flow to `params` alone; one call costs about two forward passes.

    Args:
        model: f, from parameters to outputs; the same for the same parameters.
        origin: theta_0, the parameters that move.
        params: theta, by the same names.

    Source: Ortiz-Jimenez et al. 2023, arXiv:2305.12827, eq. 5.
    """
    step = {name: params[name] - origin[name] for name in origin}
    # Fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # torch's own rules of forward mode are scripted, which torch deprecates.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        value, slope = cast("tuple[Tensor, Tensor]", jvp(model, (dict(origin),), (step,)))
    return value + slope
