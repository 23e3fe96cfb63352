"""This file is the terms of the bound by task: what each expert adds to those that are sums."""

import math
from collections.abc import Sequence

from mergekit_lit.theory.coefficients import Weighing
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts
from mergekit_lit.theory.term import sum_of


def terms_by_task(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> list[dict[str, float | None]]:
    """Return each expert's part of drift, noise and Delta^2, and its task's own terms.

    `drift`, `merged_noise` and `delta2` sum to the terms of those names; `descent` has the term as
    its mean with the weights p; `merged_gradient2` is ||grad F_Si(x_avg)||^2. None where unknown,
    or where the term is not that sum: of a gradient drift, of Delta^2 by refits, and of a merge
    that is no sum of scaled deltas.
    """
    w, a_eff, smooth = weighing.w, weighing.a_eff, merge.smoothness
    length = None if merge.step2 is None else math.fsum(merge.step2.values())
    rows: list[dict[str, float | None]] = []
    for i, expert in enumerate(experts):
        share = None if w is None or weighing.negative else w[i]
        steps = _product(expert.travel_squared, expert.noise)
        noise = None if steps is None or expert.batch is None else steps / expert.batch
        square = weighing.squares[i] if merge.linear else None
        backbone = _product(square, expert.eps2)
        head = expert.eps2_head
        known = backbone is not None and head is not None and merge.fixed
        drift = _product(a_eff, smooth, smooth, share, expert.d2, 0.5)
        rows.append(
            {
                "drift": drift if merge.gradient_drift is None else None,
                "merged_noise": _product(smooth, square, noise),
                "delta2": weighing.p[i] * ((backbone or 0.0) + (head or 0.0)) if known else None,
                "descent": sum_of([expert.base_loss, expert.slope, _product(smooth, length, 0.5)]),
                "merged_gradient2": expert.merged_gradient2,
            }
        )
    return rows


def _product(*factors: float | None) -> float | None:
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None
