"""This file chooses coefficients by what bounds the loss after the step that deltas make."""

import math
from dataclasses import dataclass

import numpy as np

from mergekit_lit.theory.optimal import ROUND, Vector
from mergekit_lit.theory.optimal_layers import solved

_GAIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What bounds the loss of x0 + sum_i lambda_i tau_i, for T experts and B blocks of parameters.

    Attributes:
        p: weights of the tasks in the target, (T,), sum 1.
        travel: s_i = eta_i ||a_i||_1, (T,), positive.
        moved: m_i^l, parts of each expert's squared displacement, (B, T); columns sum to 1.
        slopes: <grad^l F_S(x0), tau_i^l>, (B, T).
        products: <tau_i^l, tau_j^l>, (B, T, T).
        eps2: squared stability of each backbone, (T,); 0 where nobody measured or estimated it.
        smoothness: L.
        sample_gradient2: G^2.
    """

    p: Vector
    travel: Vector
    moved: Vector
    slopes: Vector
    products: Vector
    eps2: Vector
    smoothness: float
    sample_gradient2: float

    def value(self, coefficients: Vector) -> float:
        """Return what bounds F(x) - F_S(x0) at lambda (B, T); it is convex in lambda.

        sum_l [sum_i lambda_i^l slope_i^l + (L / 2) ||sum_i lambda_i^l tau_i^l||^2]
        + G Delta + L Delta^2 / 2,  Delta^2 = sum_i p_i eps_i^2 sum_l m_i^l (lambda_i^l)^2
        """
        step2 = float(np.einsum("bi,bij,bj->", coefficients, self.products, coefficients))
        delta2 = self._delta2(coefficients)
        return math.fsum(
            [
                float((self.slopes * coefficients).sum()),
                self.smoothness / 2 * step2,
                math.sqrt(self.sample_gradient2 * delta2),
                self.smoothness * delta2 / 2,
            ]
        )

    def slope(self, coefficients: Vector) -> Vector:
        """Return the gradient of `value` in lambda, (B, T)."""
        root = math.sqrt(self.sample_gradient2 * self._delta2(coefficients) + ROUND)
        of_delta2 = self.sample_gradient2 / (2 * root) + self.smoothness / 2
        curved = np.einsum("bij,bj->bi", self.products, coefficients)
        found: Vector = (
            self.slopes
            + self.smoothness * curved
            + of_delta2 * 2 * self.p * self.eps2 * self.moved * coefficients
        )
        return found

    def _delta2(self, coefficients: Vector) -> float:
        return float((self.p * self.eps2 * self.moved * coefficients**2).sum())


def best_steps(steps: Steps, *, travel: float | None, most: float) -> Vector:
    """Return the coefficients lambda >= 0, (B, T), that minimise what bounds the loss.

    Args:
        steps: what it is made of.
        travel: A_eff = sum_i s_i sum_l m_i^l lambda_i^l; None leaves it free from 0 to `most`, and
            gives all zeros where no step is better than the base.
        most: largest A_eff, positive.

    Source: the descent lemma (Nesterov 2004, Lemma 1.2.3) on the step that the deltas make, and the
    stability of our reconstruction of the bound of arXiv 2601.21690.
    Differs: needs neither surrogate nor drift, noise and divergence, which tell of a step what the
    trainings would make one expect.
    """
    weights = steps.moved * steps.travel
    target = most / 2 if travel is None else travel
    even = np.full(weights.shape, target / float(weights.sum()))
    # Travels and values of the order of 1: the solver's tolerances are absolute.
    scale = max(abs(steps.value(even) - steps.value(0 * even)), 1e-12)
    unit = most if travel is None else travel
    rows = solved(
        steps, even, weights, travel=travel, most=most, rounds=500, scale=scale, unit=unit
    )
    best = min([rows, even], key=steps.value)
    # A gain within the solver's tolerance is none.
    nothing = travel is None and steps.value(best) >= -_GAIN * scale
    return np.zeros_like(best) if nothing else best
