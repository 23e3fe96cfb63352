"""This file looks ahead: the validation loss of merges that are not trained yet.

It has the terms of the bound's functional form, each with a factor that is measured:

    F_val(merge) = F_S(x0) - c ln(1 + s / s0)              progress, less the drift that eats it
                   + q L lambda^2 squares sigma^2 N / b    noise of the merge, of recent steps
                   + base gap + g G lambda eps_path        generalization

s is the travel, `squares` the sum of (eta_k a_k)^2, eps_path the path estimate of stability: all in
closed form. c, s0 and q are fitted to the training losses of measured merges, g to the gaps between
validation and training loss of the experts, which are 1 / lambda times the merge's and so easier to
see.
What is proved of the bound (progress at most A_eff / 4 ||grad F_S||^2 below the start, a share of 1
of noise and generalization) is loose by orders of magnitude here; that progress grows with the
logarithm of travel is no theorem: it was seen on `embedded8`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]

# Turning points that are tried, from a share of the least measured travel up to the largest one:
# beyond, the law would be a straight line, which no few steps can tell from a bent one.
_TURNS = 60
_LEAST_TURN = 0.1


@dataclass(frozen=True)
class Known:
    """What closed forms tell of a merge, measured or not.

    Attributes:
        travel: s.
        noise: L lambda^2 squares sigma^2 N / b, the bound's term, of the steps that are remembered.
        stability: G lambda eps_path, the bound's term without its part of second order.
    """

    travel: float
    noise: float
    stability: float


@dataclass(frozen=True)
class Law:
    """How the training loss of a merge falls with travel.

    Attributes:
        gain: c, in nats, at least 0.
        turn: s0, positive.
        noise: q, share of the bound's noise that is seen, at least 0.
    """

    gain: float
    turn: float
    noise: float

    def change(self, known: Known) -> float:
        """Return the change of the training loss, from the base to the merge."""
        return self.noise * known.noise - self.progress(known)

    def progress(self, known: Known) -> float:
        """Return c ln(1 + s / s0)."""
        return self.gain * math.log1p(known.travel / self.turn)


def fit_law(measured: Sequence[tuple[Known, float]]) -> Law:
    """Fit the law to changes of the training loss, by least squares.

    Args:
        measured: at least one merge, and how much its training loss lies above the base's.
    """
    travels = [known.travel for known, _ in measured]
    target = np.array([-change for _, change in measured])
    # Weighed by travel, so that the far end counts: it is from there that the law looks ahead.
    weights = np.sqrt(np.array(travels) / max(travels))
    tried = [
        _fitted(float(turn), measured, weights, target)
        for turn in np.geomspace(_LEAST_TURN * min(travels), max(travels), _TURNS)
    ]
    return min(tried, key=lambda each: each[0])[1]


def _fitted(
    turn: float, measured: Sequence[tuple[Known, float]], weights: Numbers, target: Numbers
) -> tuple[float, Law]:
    """Return the law that fits best for a turning point, and what it leaves."""
    from scipy.optimize import nnls

    columns = np.array([[math.log1p(k.travel / turn), -k.noise] for k, _ in measured])
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    found, rest = nnls(weights[:, None] * columns / scale, weights * target)
    gain, noise = (float(value) for value in found / scale)
    # Rounded, so that of turning points that fit alike the first is taken everywhere.
    return round(float(rest), 12), Law(gain, turn, noise)


def fit_share(measured: Sequence[tuple[float, float]]) -> float:
    """Return the share g of pairs (predicted, seen) by least squares through 0, at least 0."""
    square = math.fsum(predicted**2 for predicted, _ in measured)
    if square == 0:
        return 0.0
    return max(0.0, math.fsum(predicted * seen for predicted, seen in measured) / square)
