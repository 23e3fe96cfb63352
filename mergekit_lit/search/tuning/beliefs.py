"""This file updates what is believed of merges by what was scored, and says what to try next."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from mergekit_lit.search.tuning.places import Numbers
from mergekit_lit.search.tuning.prior import Prior


def posterior(
    prior: Prior, seen: Sequence[int], values: Numbers, variances: Numbers
) -> tuple[Numbers, Numbers]:
    """Return mean and standard deviation of every candidate's value, (n,) each.

    mean = m + K_s (K_ss + V)^-1 (y - m_s),  cov = K - K_s (K_ss + V)^-1 K_s^T

    Args:
        prior: of n candidates.
        seen: places of those that were scored, (s,).
        values: theirs, (s,).
        variances: of the noise of these values, (s,).

    **Source:** Rasmussen & Williams 2006, eq. 2.25-2.26.
    """
    places = np.array(seen, dtype=np.intp)
    cross = prior.covariance[:, places]
    gain = np.linalg.solve(cross[places] + np.diag(variances), cross.T).T
    mean = prior.mean + gain @ (values - prior.mean[places])
    variance = np.diag(prior.covariance) - (gain * cross).sum(axis=1)
    return mean, np.sqrt(np.maximum(variance, 0.0))


def improvement(mean: Numbers, deviation: Numbers, best: float) -> Numbers:
    """Return by how much each candidate is expected to be better than the best, (n,).

    (mean - best) Phi(z) + deviation phi(z),  z = (mean - best) / deviation

    **Source:** Jones et al. 1998, eq. 15 (expected improvement).
    """
    gap = mean - best
    z = gap / np.maximum(deviation, 1e-12)
    found: Numbers = gap * norm.cdf(z) + deviation * norm.pdf(z)
    return found
