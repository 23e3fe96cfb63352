"""This file chooses coefficients by the bound: those at which its computable part is least."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]

# Below this share an expert's chi-square term would leave the range of numbers.
_LEAST_SHARE = 1e-9
_TRAVELS = 33
# What a corner of the simplex has beside p where a search begins.
_CORNER = 0.9
ROUND = 1e-20
"""Rounds the kinks of roots at 0, so that they have a slope: far below any loss or step."""


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """What the computable part of the bound is made of, for T experts.

    Attributes:
        p: weights of the tasks in the target, (T,), sum 1.
        travel: s_i = eta_i ||a_i||_1, (T,), positive.
        start: F_Si(x0), (T,).
        d2: d_i^2, (T,).
        noise: sum_k (eta_k a_k)^2 sigma_i^2 / b_i, (T,).
        eps2: squared stability of each backbone, (T,); 0 where nobody measured or estimated it.
        smoothness: L.
        gradient2: ||grad F_S(x0)||^2.
        sample_gradient2: G^2.
    """

    p: Vector
    travel: Vector
    start: Vector
    d2: Vector
    noise: Vector
    eps2: Vector
    smoothness: float
    gradient2: float
    sample_gradient2: float

    def value(self, shares: Vector, travel: float) -> float:
        """Return the computable part of the bound at the shares w and the travel A_eff.

        sum_i w_i F_Si(x0) - (A / 4) ||grad F_S(x0)||^2 + (A L^2 / 2) sum_i w_i d_i^2
        + L A^2 sum_i w_i^2 noise_i / s_i^2 + sqrt(chi2_w Var_{i~p} F_Si(x0))
        + G Delta + L Delta^2 / 2,  Delta^2 = A^2 sum_i p_i w_i^2 eps_i^2 / s_i^2

        Args:
            shares: w, (T,), positive, sum 1.
            travel: A_eff, at least 0.
        """
        steps = travel * shares / self.travel
        delta2 = float(self.p @ (steps**2 * self.eps2))
        smooth = self.smoothness
        return math.fsum(
            [
                float(shares @ self.start),
                -travel / 4 * self.gradient2,
                travel * smooth**2 / 2 * float(shares @ self.d2),
                smooth * float(steps**2 @ self.noise),
                self._divergence(shares, self.p),
                math.sqrt(self.sample_gradient2 * delta2),
                smooth * delta2 / 2,
            ]
        )

    def certified(self, shares: Vector, travel: float) -> float:
        """Return the same with Var_{i~w} in the divergence, as the bound has it.

        Without a step it is at least sum_i p_i F_Si(x0), whatever the shares.
        """
        apart = self._divergence(shares, shares) - self._divergence(shares, self.p)
        return self.value(shares, travel) + apart

    def slope(self, shares: Vector, travel: float) -> Vector:
        """Return the gradient of `value` in w, (T,)."""
        reach = travel / self.travel
        steps = reach * shares
        delta2 = float(self.p @ (steps**2 * self.eps2))
        root = math.sqrt(self.sample_gradient2 * delta2 + ROUND)
        of_delta2 = self.sample_gradient2 / (2 * root) + self.smoothness / 2
        found: Vector = (
            self.start
            + travel * self.smoothness**2 / 2 * self.d2
            + 2 * self.smoothness * steps * reach * self.noise
            - math.sqrt(self._spread(self.p))
            / (2 * math.sqrt(self._chi2(shares) + ROUND))
            * (self.p / shares) ** 2
            + of_delta2 * 2 * self.p * steps * reach * self.eps2
        )
        return found

    def _chi2(self, shares: Vector) -> float:
        return max(0.0, float((self.p**2 / shares).sum()) - 1.0)

    def _divergence(self, shares: Vector, weights: Vector) -> float:
        return math.sqrt(self._chi2(shares) * self._spread(weights))

    def _spread(self, weights: Vector) -> float:
        return float(weights @ (self.start - weights @ self.start) ** 2)


@dataclass(frozen=True)
class Optimum:
    """Where the computable part of the bound is least.

    Attributes:
        coefficients: lambda, (T,); all zero where no step is better than the base.
        shares: w, (T,); p where the coefficients are zero.
        travel: A_eff.
        value: the computable part there.
        at_base: the computable part of the base, sum_i p_i F_Si(x0).
    """

    coefficients: Vector
    shares: Vector
    travel: float
    value: float
    at_base: float


def optimum(landscape: Landscape, *, travel: float | None, most: float) -> Optimum:
    """Return the coefficients lambda >= 0 that minimise the computable part of the bound.

    A search over the shares w at fixed A_eff, within one over A_eff.

    Args:
        landscape: what it is made of.
        travel: A_eff; None searches it from 0 to `most`.
        most: largest A_eff that is tried, positive.

    Source: our reconstruction of the bound of arXiv 2601.21690.
    Differs: progress takes the gradient of the target instead of the surrogate's, which leaves the
    divergence alone not convex in w; the spread of the losses is taken at the base, and under p,
    which keeps the search from single experts; the heads' stability, which no coefficient changes,
    is left out.
    """
    at_base = float(landscape.p @ landscape.start)
    if travel is not None:
        shares = best_shares(landscape, travel)
        return _at(landscape, shares, travel, at_base)
    # Finer towards 0, where the optimum lies for far travels.
    grid = most * np.linspace(0.0, 1.0, _TRAVELS)[1:] ** 2
    tried = [_at(landscape, best_shares(landscape, a), float(a), at_base) for a in grid]
    best = min(range(len(tried)), key=lambda i: tried[i].value)
    low = float(grid[best - 1]) if best else 0.0
    high = float(grid[min(best + 1, len(grid) - 1)])
    found = _refined(landscape, low, high, at_base)
    found = min(found, tried[best], key=lambda one: one.value)
    # The spread under p alone would make some shares cheaper than the base without any step.
    if landscape.certified(found.shares, found.travel) < at_base:
        return found
    nothing = np.zeros_like(landscape.p)
    return Optimum(nothing, landscape.p.copy(), 0.0, at_base, at_base)


def best_shares(landscape: Landscape, travel: float) -> Vector:
    """Return the shares w (T,) that minimise the computable part at a fixed A_eff.

    All but the divergence is convex in w, so that the search begins at two places: beside p, and
    towards the best corner. It goes over log w, where no border is met and experts that drifted a
    thousand times as far as others do no harm.
    """
    count = len(landscape.p)
    if count == 1:
        return np.ones(1)
    # The root of chi2 has a kink at w = p: begin beside it, and compare with it.
    tilted = landscape.p * (1.0 + 0.01 * np.linspace(-1.0, 1.0, count))
    corners = _CORNER * np.eye(count) + (1.0 - _CORNER) * landscape.p
    begins = [tilted / tilted.sum(), min(corners, key=lambda w: landscape.value(w, travel))]
    found = [_descended(landscape, travel, begin) for begin in begins]
    best: Vector = min([landscape.p, *found], key=lambda w: landscape.value(w, travel))
    return best.copy()


def _descended(landscape: Landscape, travel: float, begin: Vector) -> Vector:
    """Return the shares of a minimum that is reached from some others."""
    from scipy.optimize import minimize

    at_begin = landscape.value(begin, travel)
    slope = landscape.slope(begin, travel)
    # Slopes of the order of 1, whatever the landscape's: the solver's tolerances are absolute.
    scale = max(float(np.abs(slope - slope.mean()).max()), ROUND)

    def told(z: Vector) -> tuple[float, Vector]:
        shares = _shares(z)
        slope = landscape.slope(shares, travel) / scale
        value = (landscape.value(shares, travel) - at_begin) / scale
        return value, shares * (slope - shares @ slope)

    found: Any = minimize(
        told,
        np.log(begin),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return _shares(found.x)


def _shares(z: Vector) -> Vector:
    raised = np.exp(z - z.max())
    shares: Vector = np.maximum(raised / raised.sum(), _LEAST_SHARE)
    shares /= shares.sum()
    return shares


def _refined(landscape: Landscape, low: float, high: float, at_base: float) -> Optimum:
    """Return the optimum between two travels that hold it."""
    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(
        lambda a: landscape.value(best_shares(landscape, a), a),
        bounds=(low, high),
        method="bounded",
        options={"maxiter": 20},
    )
    travel = float(found.x)
    return _at(landscape, best_shares(landscape, travel), travel, at_base)


def _at(landscape: Landscape, shares: Vector, travel: float, at_base: float) -> Optimum:
    value = landscape.value(shares, travel)
    return Optimum(travel * shares / landscape.travel, shares, travel, value, at_base)
