"""This file estimates gradient noise without bias: U-statistics over micro-batch gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.theory.norms import squared_norm


@dataclass(frozen=True)
class GradientMoments:
    """What K micro-batch gradients tell of the gradient of the whole.

    Attributes:
        signal: |G|^2, the squared norm of the mean gradient; may be negative, never clip it before
            averaging.
        trace: tr Sigma, the variance of one sample's gradient, summed over the coordinates.
    """

    signal: float
    trace: float


def gradient_moments(
    square_of_sum: float,
    sum_of_squares: float,
    *,
    count: int,
    batch: int,
    population: int | None = None,
) -> GradientMoments:
    """Return unbiased estimates of |G|^2 and tr Sigma.

    |G|^2 = (S1 - S2) / (K (K - 1)),  tr Sigma = b (S2 - S1 / K) / (K - 1)

    Drawn without replacement from n samples, two gradients lean apart: E<g_i, g_j> =
    ||grad F_S||^2 - tr Sigma / (n - 1). Given `population`, that is made good, and tr Sigma is
    the variance of one draw from these n samples (divisor n).

    Args:
        square_of_sum: S1 = ||sum_i g_i||^2 over the K micro-batch mean gradients.
        sum_of_squares: S2 = sum_i ||g_i||^2.
        count: K, at least 2.
        batch: b, samples in one micro-batch.
        population: n, if all K b samples were drawn without replacement from n; None if they are
            independent draws.

    Raises:
        ValueError: fewer than two micro-batches, or more samples than the population holds.

    Source: McCandlish et al. 2018, arXiv:1812.06162, app. A.1.
    Differs: a U-statistic over K equal micro-batches instead of two batch sizes; corrected for
    draws without replacement.
    """
    if count < 2:
        raise ValueError(f"Gradient noise needs at least 2 micro-batches, but got {count}.")
    signal = (square_of_sum - sum_of_squares) / (count * (count - 1))
    trace = batch * (sum_of_squares - square_of_sum / count) / (count - 1)
    if population is None:
        return GradientMoments(signal, trace)
    if count * batch > population:
        raise ValueError(
            f"{count} micro-batches of {batch} need {count * batch} samples without replacement, "
            f"but there are {population}. Use smaller micro-batches."
        )
    return GradientMoments(signal + trace / population, trace * (population - 1) / population)


def moments_of(
    gradients: Sequence[Sequence[Tensor]], *, batch: int, population: int | None = None
) -> GradientMoments:
    """Return |G|^2 and tr Sigma from K micro-batch gradients, each a list of tensors.

    Args:
        gradients: K mean gradients over equal micro-batches, tensor by tensor in one order.
        batch: b, samples in one micro-batch.
        population: n, if drawn without replacement; see `gradient_moments`.

    Raises:
        ValueError: see `gradient_moments`.
    """
    columns = zip(*gradients, strict=True)
    total = [torch.stack([part.double() for part in parts]).sum(0) for parts in columns]
    return gradient_moments(
        float(squared_norm(total)),
        float(sum(squared_norm(gradient) for gradient in gradients)),
        count=len(gradients),
        batch=batch,
        population=population,
    )


def noise_scale(trace: float, signal: float) -> float | None:
    """Return B_simple = tr Sigma / |G|^2 in samples; None where the signal is lost in the noise.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. 2.9.
    """
    return trace / signal if signal > 0 else None
