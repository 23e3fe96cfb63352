"""This file chooses coefficients layer by layer, where the bound's computable part is least."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.theory.optimal import ROUND, Landscape, Vector


class Convex(Protocol):
    """A convex function of coefficients (B, T), with its gradient."""

    def value(self, coefficients: Vector) -> float:
        """Return the number at some coefficients."""

    def slope(self, coefficients: Vector) -> Vector:
        """Return its gradient there, (B, T)."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the computable part of the bound is made of, for T experts and B blocks of parameters.

    Attributes:
        whole: what does not depend on the block.
        moved: m_i^l, parts of each expert's squared displacement, (B, T); columns sum to 1.
        gram: <grad^l F_Si(x0), grad^l F_Sj(x0)>, (B, T, T); estimates need not be positive.
    """

    whole: Landscape
    moved: Vector
    gram: Vector

    def value(self, coefficients: Vector) -> float:
        """Return the computable part of the bound at lambda (B, T), at least 0.

        sum_i p_i F_Si(x0) - sum_l (A_l / 4) ||grad^l F_S(x0)||^2
        + (L^2 / 2) sum_i s_i d_i^2 sum_l m_i^l lambda_i^l
        + L sum_i noise_i sum_l m_i^l (lambda_i^l)^2
        + sum_l [||b_l|| sqrt(D_l) + ||b_l||^2 / (2 A_l)] + G Delta + L Delta^2 / 2,

        A_l = sum_i lambda_i^l s_i,  b_l = sum_i (lambda_i^l s_i - p_i A_l) grad^l F_Si(x0),
        D_l = L^2 max_i m_i^l d_i^2,  Delta^2 = sum_i p_i eps_i^2 sum_l m_i^l (lambda_i^l)^2

        It is jointly convex in lambda. See `theory.bound.bound` for the assumptions.
        """
        return float(self._value(torch.from_numpy(coefficients)))

    def slope(self, coefficients: Vector) -> Vector:
        """Return the gradient of `value` in lambda, (B, T)."""
        moving = torch.from_numpy(coefficients).requires_grad_()
        (found,) = torch.autograd.grad(self._value(moving), moving)
        slope: Vector = found.numpy()
        return slope

    def _value(self, lam: Tensor) -> Tensor:
        whole, known = self.whole, self._known
        steps = lam * known["travel"]
        far = steps.sum(1)
        off = torch.einsum("bij,bj->bi", known["root"], steps - far[:, None] * known["p"])
        apart = off.square().sum(1)
        squares = (known["moved"] * lam.square()).sum(0)
        delta2 = known["p"] @ (squares * known["eps2"])
        smooth = whole.smoothness
        return (
            known["p"] @ known["start"]
            - far @ known["gradient2"] / 4
            + smooth**2 / 2 * (steps * known["moved"] * known["d2"]).sum()
            + smooth * squares @ known["noise"]
            + (apart + ROUND).sqrt() @ known["inside"]
            + (apart / (2 * far + ROUND)).sum()
            + (whole.sample_gradient2 * delta2 + ROUND).sqrt()
            + smooth * delta2 / 2
        )

    @cached_property
    def _known(self) -> dict[str, Tensor]:
        whole = self.whole
        sizes, axes = np.linalg.eigh(self.gram)
        root = np.sqrt(np.maximum(sizes, 0.0))[:, :, None] * axes.transpose(0, 2, 1)
        inside = whole.smoothness * np.sqrt((self.moved * whole.d2).max(1))
        names = ("p", "start", "travel", "d2", "noise", "eps2")
        return {
            **{name: torch.from_numpy(getattr(whole, name)) for name in names},
            "moved": torch.from_numpy(self.moved),
            "root": torch.from_numpy(root),
            "inside": torch.from_numpy(inside),
            "gradient2": torch.from_numpy(((root @ whole.p) ** 2).sum(1)),
        }


def best_rows(layers: Layers, *, travel: float | None, most: float) -> Vector:
    """Return the coefficients lambda >= 0, (B, T), that minimise the computable part of the bound.

    Args:
        layers: what it is made of.
        travel: A_eff = sum_i s_i sum_l m_i^l lambda_i^l; None leaves it free from 0 to `most`, and
            gives all zeros where no step is better than the base.
        most: largest A_eff, positive.

    Source: our reconstruction of the bound of arXiv 2601.21690.
    Differs: every block is held against the target's gradient, in the place of a surrogate's and of
    the divergence, which makes it convex in all coefficients at once; the drift within a block
    beside its mismatch is taken at its largest; the heads' stability, which no coefficient changes,
    is left out.
    """
    whole, shape = layers.whole, layers.moved.shape
    target = most / 2 if travel is None else travel
    # Travel-normalised in every block: none is off the target's gradient.
    start = np.tile(target * whole.p / whole.travel, (shape[0], 1))
    weights = layers.moved * whole.travel
    rows = solved(layers, start, weights, travel=travel, most=most, rounds=300)
    tried = [rows, start] if travel is not None else [rows, start, np.zeros(shape)]
    return min(tried, key=layers.value)


def solved(
    problem: Convex,
    start: Vector,
    weights: Vector,
    *,
    travel: float | None,
    most: float,
    rounds: int,
    scale: float = 1.0,
    unit: float = 1.0,
) -> Vector:
    """Return the coefficients (B, T), at least 0, of a travel that minimise a convex value.

    Args:
        problem: what is minimised.
        start: where to begin, (B, T).
        weights: of each coefficient in the travel, (B, T).
        travel: that must be reached; None for any up to `most`.
        most: largest travel.
        rounds: largest number of iterations.
        scale: of values, for the solver's absolute tolerance.
        unit: of travels, for the same.
    """
    from scipy.optimize import minimize

    shape, each = start.shape, weights.ravel()
    limit, kind = (most, "ineq") if travel is None else (travel, "eq")
    found: Any = minimize(
        lambda x: problem.value(x.reshape(shape)) / scale,
        start.ravel(),
        jac=lambda x: problem.slope(x.reshape(shape)).ravel() / scale,
        method="SLSQP",
        bounds=[(0.0, None)] * start.size,
        constraints=[
            {
                "type": kind,
                "fun": lambda x: limit / unit - each @ x / unit,
                "jac": lambda _: -each / unit,
            }
        ],
        options={"maxiter": rounds, "ftol": 1e-12},
    )
    rows: Vector = np.maximum(found.x, 0.0).reshape(shape)
    far = float(each @ rows.ravel())
    if travel is not None and far > 0:
        rows *= travel / far
    return rows
