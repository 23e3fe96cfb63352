"""This file is what our formulas of stability and noise say at constant gradient noise.

It is a module of `experiments/exponents.py`. Root and double root of the number of steps are
asymptotes of plain SGD at a constant rate; with momentum, warm-up or a cosine the weights of the
gradients are what the schedule makes them, and the formulas give other exponents over a grid.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mergekit_lit.lit.optimization import Optimization
from mergekit_lit.theory.stability import eps_path
from mergekit_lit.theory.travel import effective_steps, sgd_rule

WARMUP_STEPS = 10
"""Of every YAML of the sweep; a row of another experiment tells its `warmup_steps`."""
MOMENTUM = 0.9
"""What an expert is trained with unless told otherwise."""


def eps_at_constant_noise(row: Mapping[str, Any]) -> float:
    """Return eps_path of an expert whose gradients have a variance of 1 at each step."""
    steps = _weights_of(row)
    return eps_path(steps, [1.0] * len(steps), n=round(row["n"]), batch=int(row["batch"]))


def merged_noise_at_constant_noise(row: Mapping[str, Any]) -> float:
    """Return sum_k (eta_k a_k)^2 / b, which the merged noise is a multiple of."""
    steps = _weights_of(row)
    return math.fsum(step**2 for step in steps) / float(row["batch"])


def _weights_of(row: Mapping[str, Any]) -> tuple[float, ...]:
    warmup = int(row.get("warmup_steps", WARMUP_STEPS))
    return weights(row["schedule"], row["lr"], int(row["steps"]), warmup)


@lru_cache(maxsize=256)
def weights(
    schedule: Any, lr: float, steps: int, warmup_steps: int = WARMUP_STEPS
) -> tuple[float, ...]:
    """Return eta_k a_k of a training by SGD with momentum, (K,)."""
    chosen = Optimization(
        optimizer="sgd",
        lr=lr,
        momentum=MOMENTUM,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        schedule=schedule,
        warmup_steps=warmup_steps,
    )
    # A training of no more steps than the warm-up is a piece of a longer one.
    long = max(steps, warmup_steps + 1)
    rates = [lr * chosen.factor(step, long) for step in range(steps)]
    rules = [sgd_rule(rate, momentum=MOMENTUM) for rate in rates]
    return tuple(effective_steps(rules).tolist())
