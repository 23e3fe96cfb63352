"""This file is the methods that minimise a loss over the merged weights, without data: WUDI."""

from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.params import wide
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.threads import one_thread
from mergekit_lit.merging.configuration import check_scale
from mergekit_lit.merging.methods.spectral import (
    is_matrix,
    like,
    matrices,
    mean_of,
    summed_matrix,
)


@MERGE_METHODS.add(
    form="kernel",
    family="descent",
    data="none",
    source="Cheng et al. 2025, arXiv:2503.08099 (WUDI)",
    # Adam's rate is in the units of the weights: the right one depends on the deltas' size.
    search={"lr": (1e-5, 1e-3), "scale": (0.0, 1.5)},
    homogeneous=True,
)
@one_thread()
def wudi(
    tensor: Slice,
    *,
    solver: Literal["adam", "exact"] = "adam",
    lr: float = 1e-5,
    steps: int = 300,
    ridge: float = 0.1,
    rest: Literal["base", "mean"] = "base",
    scale: float = 1.0,
) -> Tensor:
    """Find the step that differs from each delta where that delta's inputs do not look.

    min_M sum_t ||(M - Delta_t) Delta_t^T||^2 / ||Delta_t||^2, by Adam from sum_t Delta_t

    With C_t = Delta_t^T Delta_t / ||Delta_t||^2, A = sum_t C_t and B = sum_t Delta_t C_t the
    gradient is 2 (M A - B), one product a step whatever T; its zero is M = B A^-1, which is RegMean
    with C_t in place of the inputs' second moments.

    Args:
        tensor: deltas (T, *s); linear weights and convolutions are matrices (m, n).
        solver: `adam` stops early, as the paper does; `exact` returns B (A + ridge T/n I)^-1.
        lr: learning rate of `adam`, in the units of the weights, > 0. No entry moves further than
            about lr * steps: where deltas are larger than the paper's, so must this be.
        steps: number of steps of `adam`, >= 0.
        ridge: of `exact`, in units of A's mean eigenvalue T/n, > 0. Where deltas hardly look, less
            lets the solution grow without bound: convolutions above all.
        rest: other tensors stay the `base`'s, or take the `mean` of the deltas.
        scale: length of the step, unitless, >= 0; 1 is the paper's.

    Returns:
        The step, (*s).

    Source: Cheng et al. 2025, arXiv:2503.08099 (WUDI-Merging).
    Differs: convolutions too, as matrices (C_out, C_in * kh * kw); the gradient is written out.
    """
    _check(lr, steps, ridge)
    check_scale(scale)
    if not is_matrix(tensor):
        mean = mean_of(tensor)
        return scale * mean if rest == "mean" else torch.zeros_like(mean)
    products, targets = _normal_equations(tensor)
    if solver == "exact":
        damping = ridge * len(tensor.each) / len(products)
        damped = products + damping * torch.eye(len(products), dtype=products.dtype)
        solution = torch.linalg.solve(damped, targets.mT).mT
    else:
        # Adam's steps of 1e-5 are far above float32's rounding; twice the speed of float64.
        dtype = wide(tensor.base).dtype
        start, a, b = (x.to(dtype) for x in (summed_matrix(tensor), products, targets))
        solution = _adam(start, a, b, lr=lr, steps=steps)
    return scale * like(solution, tensor)


def _normal_equations(tensor: Slice) -> tuple[Tensor, Tensor]:
    """Return A = sum_t C_t, (n, n), and B = sum_t Delta_t C_t, (m, n)."""
    rows = tensor.base.shape[0]
    columns = tensor.base.numel() // rows
    products = torch.zeros(columns, columns, dtype=torch.float64)
    targets = torch.zeros(rows, columns, dtype=torch.float64)
    for delta in matrices(tensor):
        size = delta.square().sum()
        if size > 0:
            weighted = delta.mT @ delta / size
            products += weighted
            targets += delta @ weighted
    return products, targets


def _adam(start: Tensor, products: Tensor, targets: Tensor, *, lr: float, steps: int) -> Tensor:
    """Return M after steps of Adam (Kingma & Ba 2015, alg. 1) along the gradient 2 (M A - B)."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    solution = start.clone()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = 2 * (solution @ products - targets)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(epsilon)
        solution.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
    return solution


def _check(lr: float, steps: int, ridge: float) -> None:
    for name, value in (("lr", lr), ("ridge", ridge)):
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, but is {value!r}.")
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, but is {steps!r}.")
