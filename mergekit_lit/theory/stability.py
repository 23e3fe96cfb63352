"""This file is stability: estimated along the path, without an exponential, and seen by twins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mergekit_lit.core.seeds import generator
from mergekit_lit.theory.travel import StepRule, WeightedSquares, WeightedSum


@dataclass(frozen=True)
class PathNoise:
    """What the gradient noise of a run adds up to so far.

    Attributes:
        squares: sum_k (eta_k a_k)^2 sigma_k^2.
        coherent: sum_k eta_k a_k sigma_k.
    """

    squares: WeightedSquares = field(default_factory=WeightedSquares)
    coherent: WeightedSum = field(default_factory=WeightedSum)

    def advance(self, variance: float, rule: StepRule) -> "PathNoise":
        """Return the sums after one more step, at which sigma_k^2 = `variance`."""
        return PathNoise(
            self.squares.advance(variance, rule), self.coherent.advance(math.sqrt(variance), rule)
        )


def stability_estimate(squares: float, coherent: float, *, n: int, batch: int) -> float:
    """Return eps_path^2 from the two weighted sums of the gradient noise.

    eps_path^2 = (2 / (n b)) sum_k (eta_k a_k)^2 sigma_k^2 + (2 / n^2) (sum_k eta_k a_k sigma_k)^2

    The first part is the noise of which batch holds the replaced sample, the second the coherent
    push of meeting it again each epoch; it dominates after about n / b steps. It is an estimate of
    the size, to be calibrated against refits, and no upper bound.

    Args:
        squares: sum_k (eta_k a_k)^2 sigma_k^2, at least 0.
        coherent: sum_k eta_k a_k sigma_k, at least 0.
        n: training samples, at least 1.
        batch: b, samples in one step, at least 1.

    Raises:
        ValueError: `n` or `batch` below 1.

    Source: our reconstruction of the bound, after Lei & Ying 2020, arXiv:2006.08157.
    Differs: follows the measured path; the factor exp(2 eta L K) of the worst case is left out.
    """
    for name, value in (("n", n), ("batch", batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    return 2.0 * squares / (n * batch) + 2.0 * (coherent / n) ** 2


def eps_path(steps: Sequence[float], variances: Sequence[float], *, n: int, batch: int) -> float:
    """Return eps_path of a finished run, the root of `stability_estimate`.

    Args:
        steps: eta_k a_k, K weights.
        variances: sigma_k^2 = tr Sigma at each of the K steps.
        n: training samples.
        batch: b, samples in one step.

    Raises:
        ValueError: different lengths, or `n` or `batch` below 1.
    """
    pairs = list(zip(steps, variances, strict=True))
    squares = math.fsum(step**2 * variance for step, variance in pairs)
    coherent = math.fsum(step * math.sqrt(variance) for step, variance in pairs)
    return math.sqrt(stability_estimate(squares, coherent, n=n, batch=batch))


@dataclass(frozen=True)
class TwinSpread:
    """Squared distances of twins, each per replaced sample, summed up.

    Attributes:
        mean: eps^2, what the bound takes.
        median: of the twins.
        low: lower end of the bootstrap interval of the median; None for fewer than 2 twins.
        high: its upper end.
    """

    mean: float
    median: float
    low: float | None
    high: float | None


def twin_spread(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> TwinSpread:
    """Return mean and median over twins, with the percentile bootstrap interval of the median.

    Args:
        values: ||x' - x||^2 / m of each twin.
        level: of the interval, in (0, 1).
        draws: resamples.
        seed: of the resampling.

    Raises:
        ValueError: no twin.

    Source: Efron 1979, doi:10.1214/aos/1176344552, section 2.
    """
    if not values:
        raise ValueError("A spread over twins needs at least one twin, but got none.")
    found = torch.tensor(values, dtype=torch.float64)
    mean, middle = float(found.mean()), float(found.quantile(0.5))
    if len(values) < 2:
        return TwinSpread(mean, middle, None, None)
    picked = torch.randint(
        len(values), (draws, len(values)), generator=generator(seed, "bootstrap", len(values))
    )
    medians = found[picked].quantile(0.5, dim=1)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = medians.quantile(ends).tolist()
    return TwinSpread(mean, middle, low, high)
