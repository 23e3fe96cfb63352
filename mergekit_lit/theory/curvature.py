"""This file is curvature: the largest eigenvalue of a Hessian, and smoothness along a path."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.seeds import generator


@dataclass(frozen=True)
class Eigenvalue:
    """The eigenvalue of a symmetric operator that is largest in absolute value.

    Attributes:
        value: the Ritz value.
        low: value minus the residual: an eigenvalue lies within.
        high: value plus the residual.
        products: products with the operator that it took.
    """

    value: float
    low: float
    high: float
    products: int


@dataclass(frozen=True)
class Secant:
    """A quantile of the secants of a path, and the pair of points that lies nearest to it.

    Attributes:
        value: ||g(x) - g(y)|| / ||x - y||.
        pair: places of these points.
    """

    value: float
    pair: tuple[int, int]


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 20, tolerance: float = 1e-3
) -> Eigenvalue:
    """Return the dominant eigenvalue by the Lanczos iteration with full reorthogonalisation.

    With A V = V T + r e^T: the Ritz value theta of T with eigenvector s lies within ||r|| |s_m| of
    an eigenvalue of A. It never exceeds the true largest absolute value: what is missed is missed
    below.

    Args:
        product: v -> A v, symmetric, (P,) to (P,).
        start: (P,), not zero; float32 or better.
        steps: largest number of products m, at least 1.
        tolerance: stop once the residual is below this share of the value.

    Raises:
        ValueError: fewer than one step, a zero start, or a product that is not finite.

    Source: Lanczos 1950, doi:10.6028/jres.045.026; the residual bound: Parlett 1998, sec. 13.2.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, but is {steps!r}.")
    if not float(start.norm()) > 0:
        raise ValueError("The Lanczos iteration must start from a vector that is not zero.")
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        moved = product(basis[-1])
        if not bool(moved.isfinite().all()):
            raise ValueError("A Hessian-vector product must be finite, but is not.")
        diagonal.append(float(basis[-1] @ moved))
        rest = moved
        # Twice is enough to make rounding lose nothing of the orthogonality.
        for _ in range(2):
            held = torch.stack(basis)
            rest = rest - held.T @ (held @ rest)
        size = float(rest.norm())
        value, last = _ritz(diagonal, beside)
        residual = size * abs(last)
        done = len(diagonal) == min(steps, start.numel())
        if done or residual <= tolerance * abs(value) or size == 0:
            return Eigenvalue(value, value - residual, value + residual, len(diagonal))
        beside.append(size)
        basis.append(rest / size)


def random_direction(like: Tensor, seed: int) -> Tensor:
    """Return a normal vector (P,) of the kind of `like`, a function of seed and size alone."""
    drawn = torch.randn(like.numel(), generator=generator(seed, "lanczos"), dtype=torch.float64)
    return drawn.to(like)


def rayleigh(product: Callable[[Tensor], Tensor], direction: Tensor) -> float:
    """Return v^T A v / ||v||^2, the curvature along a direction.

    Raises:
        ValueError: the direction is zero.
    """
    square = float(direction.double().square().sum())
    if square == 0:
        raise ValueError("The curvature along a direction needs one that is not zero.")
    return float(direction.double() @ product(direction).double()) / square


def secant_smoothness(
    points: Sequence[Tensor], gradients: Sequence[Tensor], *, quantile: float = 0.95
) -> Secant:
    """Return a quantile of ||g(x) - g(y)|| / ||x - y|| over all pairs of points of a path.

    Args:
        points: at least 2 parameter vectors (P,).
        gradients: the gradient of one and the same loss at each.
        quantile: in [0, 1]; 1 for the largest.

    Raises:
        ValueError: fewer than two points that differ.

    Source: the definition of L-smoothness, Nesterov 2004, sec. 1.2.2, on the pairs at hand.
    """
    ratios = {}
    pairs = list(zip(points, gradients, strict=True))
    for i, (x, g) in enumerate(pairs):
        for j, (y, h) in enumerate(pairs[:i]):
            apart = float((x - y).double().norm())
            if apart > 0:
                ratios[i, j] = float((g - h).double().norm()) / apart
    if not ratios:
        raise ValueError("A secant needs at least two points that differ, but got none.")
    found = torch.tensor(list(ratios.values()), dtype=torch.float64)
    value = float(found.quantile(quantile))
    return Secant(value, min(ratios, key=lambda pair: abs(ratios[pair] - value)))


def _ritz(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Return the dominant eigenvalue of a tridiagonal matrix, and its vector's last entry."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    values, vectors = torch.linalg.eigh(matrix)
    at = int(values.abs().argmax())
    found = float(values[at])
    return (found, float(vectors[-1, at])) if math.isfinite(found) else (math.nan, 1.0)
