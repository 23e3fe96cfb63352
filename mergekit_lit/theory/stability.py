"""This file estimates stability along the path, without an exponential of the training length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
