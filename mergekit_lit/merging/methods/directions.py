"""This file is directions: T vectors seen through their inner products alone."""

import torch
from torch import Tensor

from mergekit_lit.merging.reductions import gram

# Angles below this, in radians, cannot be told from 0 (or pi) in float64.
_SMALLEST_ANGLE = 1e-7

# The Karcher mean has been found when the tangents' mean is shorter than this, in radians.
_CONVERGED = 1e-5


def lengths_and_cosines(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return |x_t|, (T,), and the cosines of x_s and x_t, (T, T); 0 with a zero vector."""
    products = gram(rows)
    lengths = products.diagonal().sqrt()
    unit = torch.where(lengths > 0, 1 / lengths, 0)
    return lengths, products * unit[:, None] * unit


def mean_direction(cosines: Tensor, shares: Tensor, iterations: int) -> Tensor | None:
    """Return a, (T,), of the unit vector sum_t a_t u_t in the middle of T; None if they cancel."""
    mean = shares
    length = _length(mean, cosines)
    if length < _SMALLEST_ANGLE:
        return None
    mean = mean / length
    for _ in range(iterations):
        cosine = (cosines @ mean).clamp(-1, 1)  # of u_t and the mean, (T,)
        sine = (1 - cosine.square()).sqrt()
        near = torch.where(cosine > 0, 1.0, 0.0)  # of angle / sine, at angles 0 and pi
        stretch = torch.where(sine > _SMALLEST_ANGLE, cosine.acos() / sine, near)
        pull = shares * stretch
        tangent = pull - (pull * cosine).sum() * mean
        length = _length(tangent, cosines)
        if length < _CONVERGED:
            break
        mean = length.cos() * mean + length.sin() / length * tangent
        mean = mean / _length(mean, cosines)
    return mean


def _length(coefficients: Tensor, cosines: Tensor) -> Tensor:
    """Return |sum_t a_t u_t|, 0-dimensional."""
    return (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
