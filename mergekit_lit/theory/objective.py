"""This file is the losses of the tasks as functions of the weights that merging moves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.params import Params

# Bytes that the gradients of the images of one chunk may take.
_GRADIENT_BYTES = 2**28


@dataclass(frozen=True)
class Objective:
    """The cross-entropy F_i of one task's head as a function of the backbone's weights x.

    The network is in evaluation mode: under fixed BatchNorm statistics F_i is one function of x,
    which no batch changes.

    Attributes:
        task: i.
        calibration: networks and heads.
        fixed: what does not move, such as the statistics, by name.
    """

    task: str
    calibration: Calibration
    fixed: Params

    def loss(self, weights: Params, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over a batch, differentiable in `weights`."""
        features = self.calibration.expert.features({**self.fixed, **weights}, batch.inputs)
        logits = self.calibration.logits(self.task, features)
        return cross_entropy(logits, labels_of(batch, self.task))

    def gradient(self, weights: Params, batch: Batch) -> Tensor:
        """Return the gradient over a batch, flattened in the order of `weights`, (P,)."""
        moving = {name: t.detach().requires_grad_() for name, t in weights.items()}
        found = torch.autograd.grad(self.loss(moving, batch), list(moving.values()))
        return torch.cat([part.flatten() for part in found])

    def squared_gradients(self, weights: Params, batch: Batch) -> Tensor:
        """Return the squared gradient norm of each sample of a batch, (b,)."""

        def of_one(moving: Params, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(moving, Batch(x[None], y[None]))

        each = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        chunk = max(1, _GRADIENT_BYTES // max(1, each))
        gradients = vmap(grad(of_one), in_dims=(None, 0, 0), chunk_size=chunk)
        # Only the plain attention has a rule for the gradients of each image.
        with sdpa_kernel(SDPBackend.MATH):
            found = gradients(dict(weights), batch.inputs, labels_of(batch, self.task))
        squares = [part.double().reshape(len(part), -1).square().sum(1) for part in found.values()]
        return torch.stack(squares).sum(0)


def labels_of(batch: Batch, task: str) -> Tensor:
    """Return the labels of a batch.

    Raises:
        ValueError: there are none.
    """
    if batch.labels is None:
        raise ValueError(f"The loss of task {task!r} needs labels, but its images have none.")
    return batch.labels


def hessian_product(
    objectives: Sequence[Objective], batches: Mapping[str, Batch], weights: Params
) -> Callable[[Tensor], Tensor]:
    """Return v -> H v with the Hessian of the mean of the tasks' losses at `weights`, (P,) to (P,).

    Args:
        objectives: of the tasks.
        batches: one fixed batch of each task.
        weights: where; P numbers in all.
    """
    shapes = [tensor.shape for tensor in weights.values()]
    sizes = [tensor.numel() for tensor in weights.values()]

    def product(vector: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(torch.split(vector, sizes), shapes, strict=True)]
        total = torch.zeros_like(vector)
        for objective in objectives:
            moving = {name: t.detach().requires_grad_() for name, t in weights.items()}
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                loss = objective.loss(moving, batches[objective.task])
                slopes = torch.autograd.grad(loss, list(moving.values()), create_graph=True)
                along = torch.stack(
                    [(s * p).sum() for s, p in zip(slopes, parts, strict=True)]
                ).sum()
                curved = torch.autograd.grad(along, list(moving.values()), materialize_grads=True)
            total += torch.cat([part.flatten() for part in curved]) / len(objectives)
        return total

    return product
