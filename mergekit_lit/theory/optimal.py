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
        chi2 = float((self.p**2 / shares).sum()) - 1.0
        spread = float(self.p @ (self.start - self.p @ self.start) ** 2)
        delta2 = float(self.p @ (steps**2 * self.eps2))
        smooth = self.smoothness
        return math.fsum(
            [
                float(shares @ self.start),
                -travel / 4 * self.gradient2,
                travel * smooth**2 / 2 * float(shares @ self.d2),
                smooth * float(steps**2 @ self.noise),
                math.sqrt(max(0.0, chi2) * spread),
                math.sqrt(self.sample_gradient2 * delta2),
                smooth * delta2 / 2,
            ]
        )


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

    At fixed A_eff it is convex in lambda; an outer search goes over A_eff.

    Args:
        landscape: what it is made of.
        travel: A_eff; None searches it from 0 to `most`.
        most: largest A_eff that is tried, positive.

    Source: our reconstruction of the bound of arXiv 2601.21690.
    Differs: progress takes the gradient of the target instead of the surrogate's, which is what
    makes it convex; the spread of the losses is taken at the base; the heads' stability, which no
    coefficient changes, is left out.
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
    if found.value < at_base:
        return found
    nothing = np.zeros_like(landscape.p)
    return Optimum(nothing, landscape.p.copy(), 0.0, at_base, at_base)


def best_shares(landscape: Landscape, travel: float) -> Vector:
    """Return the shares w (T,) that minimise the computable part at a fixed A_eff."""
    from scipy.optimize import minimize

    count = len(landscape.p)
    if count == 1:
        return np.ones(1)
    # The root of chi2 has a kink at w = p: begin beside it, and compare with it.
    tilted = landscape.p * (1.0 + 0.01 * np.linspace(-1.0, 1.0, count))
    found: Any = minimize(
        lambda w: landscape.value(np.maximum(w, _LEAST_SHARE), travel),
        tilted / tilted.sum(),
        method="SLSQP",
        bounds=[(_LEAST_SHARE, 1.0)] * count,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1.0}],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    shares: Vector = np.maximum(found.x, _LEAST_SHARE)
    shares = shares / shares.sum()
    better = landscape.value(shares, travel) < landscape.value(landscape.p, travel)
    return shares if better else landscape.p.copy()


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
