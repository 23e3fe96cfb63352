"""The mathematics of merging: travel, noise, stability, and the bound on a merge's excess error.

What comes from where:

- *The source*, arXiv 2601.21690: that the excess error of a merge splits into stability and
  optimization; that heterogeneity and a chi-square divergence of the coefficients enter it; the
  merged gradient norm as optimization error; the three signatures of failure. Its theorems' texts
  were not at hand: nothing here is its theorem.
- *Cited*: l2 on-average model stability (Lei & Ying 2020), effective step vectors and the surrogate
  objective (Wang et al. 2020), the scale of gradient noise (McCandlish et al. 2018), the descent
  lemma (Nesterov 2004).
- *Our reconstruction of the bound*: the terms of `terms` and their sum in `bound`, proved from what
  is cited and checked on quadratics (tests/theory/test_bound.py); the second divergence chi2_w;
  coefficients that differ by layer, and the term `mismatch` that they bring; the second total, of
  the step that the deltas make (`descent`); the path estimate of stability; `bound_optimal` and
  `travel_normalised`.
"""

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
