"""The mathematics of merging: travel, gradient noise, stability."""

from mergekit_lit.theory.noise import (
    GradientMoments,
    gradient_moments,
    moments_of,
    noise_scale,
)
from mergekit_lit.theory.stability import PathNoise, eps_path, stability_estimate
from mergekit_lit.theory.travel import (
    StepRule,
    Travel,
    WeightedSquares,
    WeightedSum,
    decayed_share,
    effective_steps,
    sgd_rule,
    step_l1,
    step_l2_squared,
)

__all__ = [
    "GradientMoments",
    "PathNoise",
    "StepRule",
    "Travel",
    "WeightedSquares",
    "WeightedSum",
    "decayed_share",
    "effective_steps",
    "eps_path",
    "gradient_moments",
    "moments_of",
    "noise_scale",
    "sgd_rule",
    "stability_estimate",
    "step_l1",
    "step_l2_squared",
]
