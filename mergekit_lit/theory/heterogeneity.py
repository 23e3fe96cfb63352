"""This file estimates gradients of tasks and how much they differ, without bias, with intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.core.student import student_quantile
from mergekit_lit.theory.noise import GradientMoments, gradient_moments

Statistic = Callable[[Tensor], float]
"""From the Gram matrix (K, K) of K micro-batch vectors to an estimate."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the estimate; of a squared norm it may be negative.
        low: lower end of the interval; None where it cannot be told.
        high: its upper end.
        samples: what it cost, in gradients of single samples; a product with a Hessian counts two.
    """

    value: float
    low: float | None
    high: float | None
    samples: int


@dataclass(frozen=True)
class TaskGradients:
    """Micro-batch gradients of the tasks at one point.

    Attributes:
        rows: of each of T tasks, K mean gradients over micro-batches, (K, P).
        batch: b, samples in a micro-batch.
        sizes: n of each task, if its micro-batches were drawn without replacement from so many
            samples; None for independent draws.
    """

    rows: Sequence[Tensor]
    batch: int
    sizes: Sequence[int | None]


def task_noise(gradients: TaskGradients, task: int, *, level: float = 0.95) -> Estimate:
    """Return sigma_i^2 = tr Sigma of one sample of a task.

    tr Sigma = b (S2 - S1 / K) / (K - 1), S1 = ||sum_k g_k||^2, S2 = sum_k ||g_k||^2
    """
    rows, population = gradients.rows[task], gradients.sizes[task]

    def statistic(gram: Tensor) -> float:
        return _moments(gram, gradients.batch, population).trace

    return _with_interval(_gram(rows), statistic, level, len(rows) * gradients.batch)


def mean_gradient_square(
    gradients: TaskGradients, weights: Sequence[float], *, level: float = 0.95
) -> Estimate:
    """Return ||sum_i w_i grad F_Si||^2, such as the merged gradient norm ||grad F_S(x_avg)||^2.

    A U-statistic: <G_j, G_k> over pairs j != k of G_k = sum_i w_i g_ik. The plain square would be
    too large by the noise. Drawn without replacement from n_i samples, the gradients lean apart by
    w_i^2 tr Sigma_i / n_i (divisor n_i - 1 in tr Sigma), which is made good.

    Args:
        gradients: of T tasks, the same number K of micro-batches of each, at least 2.
        weights: w_i of each task.
        level: of the jackknife interval.
    """
    rows = _weighted(gradients.rows, weights)
    lean = _leaning(gradients, weights)
    samples = gradients.batch * sum(len(r) for r in gradients.rows)
    return _with_interval(_gram(rows), lambda gram: _off_diagonal(gram) + lean, level, samples)


def heterogeneity(
    gradients: TaskGradients, task: int, weights: Sequence[float], *, level: float = 0.95
) -> Estimate:
    """Return zeta_i^2 = ||grad F_Si - sum_j w_j grad F_Sj||^2 as a U-statistic.

    <g_ij - G_j, g_ik - G_k> over pairs j != k of micro-batches: each half sees other samples, so
    that noise does not enter the mean. The plain square is too large by it.

    Args:
        gradients: of T tasks, the same number K of micro-batches of each, at least 2.
        task: i.
        weights: w of the mean that the task is compared with; p_i for the target.
        level: of the jackknife interval.

    Source: theory of U-statistics, Hoeffding 1948, doi:10.1214/aoms/1177730196.
    """
    shares = [float(j == task) - w for j, w in enumerate(weights)]
    return mean_gradient_square(gradients, shares, level=level)


def gradient_products(gradients: TaskGradients, columns: Sequence[slice]) -> list[list[float]]:
    """Return <grad F_Si, grad F_Sj> of T tasks over some of the parameters, (T, T).

    The U-statistic that `mean_gradient_square` is: w^T (products) w is its value for the weights w.

    Args:
        gradients: of T tasks, the same number K of micro-batches of each, at least 2.
        columns: which of the P parameters.
    """
    tasks, count = len(gradients.rows), len(gradients.rows[0])
    of_sums = torch.zeros(tasks, tasks, dtype=torch.float64)
    alike = torch.zeros_like(of_sums)
    # Tensor by tensor: the double of all gradients would not always fit.
    for part in columns:
        each = torch.stack([rows[:, part].double() for rows in gradients.rows])
        of_sums += each.sum(1) @ each.sum(1).T
        alike += each.flatten(1) @ each.flatten(1).T
    products = (of_sums - alike) / (count * (count - 1))
    for i, size in enumerate(gradients.sizes):
        if size is not None:
            square, squares = float(of_sums[i, i]), float(alike[i, i])
            spread = gradient_moments(square, squares, count=count, batch=gradients.batch)
            products[i, i] += spread.trace / size
    return [[float(entry) for entry in row] for row in products]


def mean_slopes(
    gradients: TaskGradients,
    weights: Sequence[float],
    directions: Tensor,
    columns: Sequence[slice],
    *,
    level: float = 0.95,
) -> list[Estimate]:
    """Return <sum_i w_i grad F_Si, v> along V directions over some of the parameters.

    Args:
        gradients: of T tasks, the same number K of micro-batches of each, at least 2.
        weights: w_i of each task.
        directions: v, over these parameters one part after the other, (V, Q).
        columns: which of the P parameters, Q in all.
        level: of Student's interval over micro-batches.
    """
    count = len(gradients.rows[0])
    each = torch.zeros(count, len(directions), dtype=torch.float64)
    start = 0
    for part in columns:
        mean = _weighted([rows[:, part] for rows in gradients.rows], weights)
        each += mean @ directions[:, start : start + mean.shape[1]].double().T
        start += mean.shape[1]
    samples = gradients.batch * sum(len(rows) for rows in gradients.rows)
    half = student_quantile(level, count - 1) * each.std(0) / math.sqrt(count)
    pairs = zip(each.mean(0).tolist(), half.tolist(), strict=True)
    if count < 3:
        return [Estimate(value, None, None, samples) for value, _ in pairs]
    return [Estimate(value, value - wide, value + wide, samples) for value, wide in pairs]


def per_sample_square(squares: Tensor, *, level: float = 0.95) -> Estimate:
    """Return G^2 = (1/n) sum_j ||grad f(x; z_j)||^2 with Student's interval.

    Args:
        squares: squared gradient norm of each sample, (n,), n >= 1.
        level: of the interval.
    """
    wide = squares.double()
    value = float(wide.mean())
    if len(wide) < 2:
        return Estimate(value, None, None, len(wide))
    half = student_quantile(level, len(wide) - 1) * float(wide.std()) / math.sqrt(len(wide))
    return Estimate(value, value - half, value + half, len(wide))


def _weighted(of_tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    counts = {len(rows) for rows in of_tasks}
    if len(counts) != 1 or counts.pop() < 2:
        raise ValueError(
            "Each task must have the same number of micro-batches, at least 2, but they have "
            f"{[len(rows) for rows in of_tasks]}."
        )
    return torch.stack([w * rows.double() for w, rows in zip(weights, of_tasks, strict=True)]).sum(
        0
    )


def _leaning(gradients: TaskGradients, weights: Sequence[float]) -> float:
    """Return what draws without replacement take from <G_j, G_k>, by the tasks' own noise."""
    lean = 0.0
    for rows, size, weight in zip(gradients.rows, gradients.sizes, weights, strict=True):
        if size is not None:
            spread = gradient_moments(*_sums(_gram(rows)), count=len(rows), batch=gradients.batch)
            lean += weight**2 * spread.trace / size
    return lean


def _gram(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.T


def _sums(gram: Tensor) -> tuple[float, float]:
    return float(gram.sum()), float(gram.diagonal().sum())


def _moments(gram: Tensor, batch: int, population: int | None) -> GradientMoments:
    return gradient_moments(*_sums(gram), count=len(gram), batch=batch, population=population)


def _off_diagonal(gram: Tensor) -> float:
    total, diagonal = _sums(gram)
    return (total - diagonal) / (len(gram) * (len(gram) - 1))


def _with_interval(gram: Tensor, statistic: Statistic, level: float, samples: int) -> Estimate:
    """Return a statistic with its jackknife interval over micro-batches.

    Source: Tukey 1958, with Student's quantile as he has it; Efron & Stein 1981,
    doi:10.1214/aos/1176345462: its spread is on average not too small.
    """
    value, count = statistic(gram), len(gram)
    if count < 3:
        return Estimate(value, None, None, samples)
    kept = [[k for k in range(count) if k != left] for left in range(count)]
    parts = torch.tensor([statistic(gram[k][:, k]) for k in kept], dtype=torch.float64)
    spread = (count - 1) / count * float((parts - parts.mean()).square().sum())
    half = student_quantile(level, count - 1) * math.sqrt(spread)
    return Estimate(value, value - half, value + half, samples)
