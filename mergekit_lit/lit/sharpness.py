"""This file is sharpness-aware minimisation: the gradient is taken uphill of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lit.lit.sync import means_over_processes
from mergekit_lit.theory.norms import squared_norm


class Ascent:
    """The way up from x to x + r g / ||g||, and back to the same bits.

    The step that the optimizer then takes from x uses the gradient at the top.

    Source: Foret et al. 2021, arXiv:2010.01412, eq. 2 and alg. 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self._below: list[Tensor] = []

    def gradients(self, loss: Tensor, strategy: Strategy) -> list[Tensor]:
        """Return the gradient of a loss, the mean over all processes.

        Every process goes up the same way, so that all are at one point.
        """
        found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        return means_over_processes(found, strategy)

    @torch.no_grad()
    def up(self, gradients: Sequence[Tensor], radius: float) -> Tensor:
        """Move to x + r g / ||g|| in place and return ||g||; where g is 0, stay.

        Args:
            gradients: g, one per parameter.
            radius: r, at least 0.
        """
        self._below = [p.detach().clone() for p in self.parameters]
        norm = squared_norm(gradients).sqrt()
        scale = torch.where(norm > 0, radius / norm, torch.zeros_like(norm))
        steps = [
            (gradient * scale).to(p) for p, gradient in zip(self.parameters, gradients, strict=True)
        ]
        torch._foreach_add_(self.parameters, steps)
        return norm

    @torch.no_grad()
    def down(self) -> None:
        """Move back to x, if up."""
        if self._below:
            torch._foreach_copy_(self.parameters, self._below)
        self._below = []


def check_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer whose steps cannot be sharpness-aware.

    Raises:
        ValueError: steps that are accumulated, or in fp16.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            "`trainer.accumulate_grad_batches` must be 1 with `sam_radius`, which goes uphill "
            f"once a step, but is {trainer.accumulate_grad_batches}. Raise `data.batch`."
        )
    if getattr(trainer.precision_plugin, "scaler", None):
        raise ValueError(
            f"`trainer.precision` must not scale the loss with `sam_radius`, but is "
            f"{trainer.precision!r}. Use 'bf16-mixed' or '32-true'."
        )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch as before, but leave its running statistics."""
    tracking = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    ]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
