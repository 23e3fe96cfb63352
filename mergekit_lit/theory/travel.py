"""This file is how far an optimizer's schedule carries: effective step vectors and their sums.

A linear optimizer (SGD, with or without momentum) moves tau_K = -sum_k w_k g_k, where the weight
w_k = eta_k a_k of gradient k depends on the schedule alone, never on the data. With momentum a
gradient acts on every later step too, so w_k is known only when the run ends. The sums here follow
such weights exactly, step by step, in constant memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | Tensor
"""A number, or a tensor of one number that stays on its device."""


@dataclass(frozen=True)
class StepRule:
    """One step of a linear optimizer: v <- momentum v + gain g,  x <- x - lr (direct g + buffer v).

    Attributes:
        lr: eta_k.
        momentum: rho_k, in [0, 1).
        gain: share of the gradient that enters the buffer v.
        direct: share of the gradient that acts without the buffer; 1 for Nesterov.
        buffer: share of the buffer that acts: 1, or rho_k for Nesterov.
    """

    lr: float
    momentum: float = 0.0
    gain: float = 1.0
    direct: float = 0.0
    buffer: float = 1.0


def sgd_rule(
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> StepRule:
    """Return the rule of one step of `torch.optim.SGD`.

    Args:
        lr: learning rate of this step.
        momentum: momentum of this step, in [0, 1).
        dampening: share of the gradient kept out of the buffer.
        nesterov: whether the step looks ahead.
        first: whether the buffer is new: torch then fills it without dampening.

    Source: PyTorch, documentation of `torch.optim.SGD`.
    """
    gain = 1.0 if first or momentum == 0 else 1.0 - dampening
    if nesterov:
        return StepRule(lr, momentum, gain, direct=1.0, buffer=momentum)
    return StepRule(lr, momentum, gain)


def effective_steps(rules: Sequence[StepRule]) -> Tensor:
    """Return the weights w_k = eta_k a_k of the gradients in the displacement of a finished run.

    w_k = direct_k eta_k + gain_k h_k,  h_k = eta_k buffer_k + rho_{k+1} h_{k+1},  h_K = 0

    Args:
        rules: the K steps in their order.

    Returns:
        The weights (K,), float64; their sum is the travel, the sum of squares the squared travel.

    Source: Wang et al. 2020 (FedNova), arXiv:2007.07481, sec. 3: tau = -eta G a.
    Differs: learning rate and momentum may change from step to step.
    """
    weights = [0.0] * len(rules)
    held, carried = 0.0, 0.0
    for k in range(len(rules) - 1, -1, -1):
        rule = rules[k]
        held = rule.lr * rule.buffer + carried * held
        weights[k] = rule.lr * rule.direct + rule.gain * held
        carried = rule.momentum
    return torch.tensor(weights, dtype=torch.float64)


def step_l1(steps: int, *, momentum: float = 0.0) -> float:
    """Return ||a||_1 of K steps of SGD under a constant learning rate.

    ||a||_1 = [K - rho (1 - rho^K) / (1 - rho)] / (1 - rho)

    Args:
        steps: K, at least 0.
        momentum: rho, in [0, 1).

    Raises:
        ValueError: an argument outside its range.

    Source: Wang et al. 2020 (FedNova), arXiv:2007.07481, sec. 3.
    """
    _check(steps, momentum)
    rest = 1.0 - momentum
    return (steps - momentum * (1.0 - momentum**steps) / rest) / rest


def step_l2_squared(steps: int, *, momentum: float = 0.0) -> float:
    """Return ||a||_2^2 of K steps of SGD under a constant learning rate.

    ||a||_2^2 = [K - 2 rho (1 - rho^K) / (1 - rho) + rho^2 (1 - rho^2K) / (1 - rho^2)] / (1 - rho)^2

    Args:
        steps: K, at least 0.
        momentum: rho, in [0, 1).

    Raises:
        ValueError: an argument outside its range.

    Source: the square of a_k = (1 - rho^(K-k)) / (1 - rho), summed.
    """
    _check(steps, momentum)
    rest = 1.0 - momentum
    once = 2.0 * momentum * (1.0 - momentum**steps) / rest
    twice = momentum**2 * (1.0 - momentum ** (2 * steps)) / (1.0 - momentum**2)
    return (steps - once + twice) / rest**2


def decayed_share(before: float, *, lr: float, weight_decay: float) -> float:
    """Return the share of x0 that decoupled weight decay alone has taken away after one more step.

    share_k = 1 - (1 - share_{k-1}) (1 - eta_k wd)

    Coupled decay needs no such caveat: its objective holds (wd/2) ||x||^2 and the weights w_k stay.
    Decoupled decay moves x outside of the gradients, by about share * ||x0||: reported apart.

    Args:
        before: the share so far, 0 at the start.
        lr: eta_k.
        weight_decay: wd, at least 0.
    """
    return before + (1.0 - before) * lr * weight_decay


@dataclass(frozen=True)
class WeightedSum:
    """The running sum_k w_k y_k, exact after each step although each step changes all w_k.

    Attributes:
        total: sum_k w_k y_k over the steps so far.
        held: sum_k m_k y_k, where m_k is the share of gradient k in the momentum buffer.
    """

    total: Value = 0.0
    held: Value = 0.0

    def advance(self, value: Value, rule: StepRule) -> "WeightedSum":
        """Return the sum after one more step, at which y_k = `value`."""
        held = rule.momentum * self.held + rule.gain * value
        step = rule.lr * (rule.buffer * held + rule.direct * value)
        return WeightedSum(self.total + step, held)


@dataclass(frozen=True)
class WeightedSquares:
    """The running sum_k w_k^2 y_k, exact after each step although each step changes all w_k.

    Attributes:
        total: sum_k w_k^2 y_k over the steps so far.
        cross: sum_k w_k m_k y_k, where m_k is the share of gradient k in the momentum buffer.
        held: sum_k m_k^2 y_k.
    """

    total: Value = 0.0
    cross: Value = 0.0
    held: Value = 0.0

    def advance(self, value: Value, rule: StepRule) -> "WeightedSquares":
        """Return the sum after one more step, at which y_k = `value`."""
        held = rule.momentum**2 * self.held + rule.gain**2 * value
        cross = rule.momentum * self.cross
        both = rule.buffer * held + rule.direct * rule.gain * value
        once = 2.0 * rule.lr * rule.buffer * cross
        twice = rule.buffer * both + rule.direct * (rule.buffer * rule.gain + rule.direct) * value
        return WeightedSquares(self.total + once + rule.lr**2 * twice, cross + rule.lr * both, held)


@dataclass(frozen=True)
class Travel:
    """What the weights w_k = eta_k a_k of a run add up to so far.

    Attributes:
        weights: sum_k w_k, the travel eta ||a||_1.
        squares: sum_k w_k^2.
        drift: sum_k w_k ||x_k - x0||^2, which is d^2 once divided by the travel.
    """

    weights: WeightedSum = field(default_factory=WeightedSum)
    squares: WeightedSquares = field(default_factory=WeightedSquares)
    drift: WeightedSum = field(default_factory=WeightedSum)

    def advance(self, rule: StepRule, *, displacement_squared: Value = 0.0) -> "Travel":
        """Return the travel after one more step, taken from x_k with this ||x_k - x0||^2."""
        return Travel(
            self.weights.advance(1.0, rule),
            self.squares.advance(1.0, rule),
            self.drift.advance(displacement_squared, rule),
        )


def _check(steps: int, momentum: float) -> None:
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, but is {steps}.")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"`momentum` must lie in [0, 1), but is {momentum}.")
