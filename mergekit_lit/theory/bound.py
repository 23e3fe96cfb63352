"""This file is the excess-error bound of a merge, term by term: our reconstruction of the bound."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lit.theory.coefficients import Weighing, weigh
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts, check_facts
from mergekit_lit.theory.terms import (
    LARGEST_TRAVEL,
    Term,
    delta,
    delta_by_path,
    delta_by_refits,
    divergence,
    drift,
    drift_in_closed_form,
    generalization,
    merged_gradient,
    merged_noise,
    progress,
)

TOTAL = ("progress", "drift", "merged_noise", "divergence", "generalization")
"""The terms that add up to the total."""


@dataclass(frozen=True)
class Bound:
    """The terms of the bound for one merge.

    Attributes:
        terms: by name, in the order in which they are told.
        weighing: A_eff, w and the divergences.
        total: their sum as `bound` defines it; None unless every term of it is known.
        violated: assumptions that the run breaks, one sentence each.
        effective: whether an adaptive optimizer makes everything derived from travels effective.
    """

    terms: Mapping[str, Term]
    weighing: Weighing
    total: float | None
    violated: tuple[str, ...] = ()
    effective: bool = False


def bound(
    experts: Sequence[ExpertFacts],
    merge: MergeFacts,
    coefficients: Sequence[float],
    *,
    p: Sequence[float] | None = None,
) -> Bound:
    """Return every term of the excess-error bound of a merge, each with its provenance.

    E[F(x_avg) - F*] <= progress + drift + merged noise + divergence + generalization, with

        progress        F~_S(x0) - (A_eff / 4) ||grad F~_S(x0)||^2
        drift           (A_eff L^2 / 2) sum_i w_i d_i^2, or (A_eff / 2) sum_i w_i of the measured
                        gradient drift
        merged noise    L sum_i lambda_i^2 sum_k (eta_k a_k)^2 sigma_i^2 / b_i
        divergence      sqrt(chi2_w Var_{i~w} F_Si(x_avg)), the losses at the best point taken as 0
        generalization  the smaller of sqrt(2 L F_S) Delta + L Delta^2 / 2 and
                        G Delta + L Delta^2 / 2, Delta^2 = sum_i p_i (lambda_i^2 eps_i^2 + eps_h^2)

    The closed form of the drift stands beside the measured one where it is proved, and is called
    vacuous elsewhere. ||grad F_S(x_avg)||^2, the source's own optimization error, is a term by
    itself. A total is given only if each of its terms is known.

    Args:
        experts: T experts.
        merge: of the merge and the loss.
        coefficients: lambda_i. Theory takes them to be at least 0 with sum 1; other merges are our
            extension, and said so.
        p: weights of the tasks in the target; None for 1/T each.

    Raises:
        ValueError: see `weigh`; or a constant that is negative or not finite.

    Source: our reconstruction of the bound of arXiv 2601.21690, after Lei & Ying 2020
    (arXiv:2006.08157) and Wang et al. 2020 (arXiv:2007.07481).
    """
    check_facts(experts, merge)
    weighing = weigh(coefficients, [expert.travel for expert in experts], p=p)
    terms = [
        progress(weighing, merge),
        drift(weighing, experts, merge),
        drift_in_closed_form(weighing, experts, merge),
        merged_noise(weighing, experts, merge),
        merged_gradient(merge),
        divergence(weighing, experts),
        delta(weighing, experts, merge),
        delta_by_refits(merge),
        delta_by_path(weighing, experts),
    ]
    named = {term.name: term for term in terms}
    named |= generalization(weighing, experts, merge, named["delta2"])
    parts = [named[name].value for name in TOTAL]
    known = [part for part in parts if part is not None]
    return Bound(
        terms=named,
        weighing=weighing,
        total=math.fsum(known) if len(known) == len(parts) else None,
        violated=_violated(weighing, experts, merge),
        effective=any(expert.adaptive for expert in experts),
    )


def _violated(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> tuple[str, ...]:
    """Return the assumptions that do not hold, one sentence each."""
    found = []
    total = math.fsum(weighing.coefficients)
    if min(weighing.coefficients) < 0 or not math.isclose(total, 1.0, rel_tol=1e-6):
        found.append(
            f"Coefficients sum to {total:.3g}: the source takes them >= 0 with sum 1; this is our "
            "extension."
        )
    if merge.smoothness is not None:
        smooth = merge.smoothness
        fast = max((e.lr for e in experts if e.lr is not None), default=0.0)
        if fast * smooth > 2:
            found.append(f"eta L = {fast * smooth:.3g} exceeds 2: gradient descent is not stable.")
        far = max((e.travel for e in experts if e.travel is not None), default=0.0)
        if far * smooth > LARGEST_TRAVEL:
            found.append(
                f"eta K L = {far * smooth:.3g} exceeds 0.306: the drift has no closed form."
            )
        if weighing.a_eff is not None and weighing.a_eff * smooth > 0.5:
            found.append(
                f"A_eff L = {weighing.a_eff * smooth:.3g} exceeds 0.5: no progress is proved."
            )
    if any(expert.adaptive for expert in experts):
        found.append("An adaptive optimizer has no steps that the data do not change.")
    return tuple(found)
