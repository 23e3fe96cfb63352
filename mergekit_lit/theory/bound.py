"""This file is the excess-error bound of a merge, term by term: our reconstruction of the bound."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lit.theory.by_task import terms_by_task
from mergekit_lit.theory.coefficients import Block, Weighing, weigh, weigh_blocks
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts, check_facts
from mergekit_lit.theory.stability_terms import (
    delta,
    delta_by_path,
    delta_by_refits,
    generalization,
)
from mergekit_lit.theory.term import Term, joined, sum_of
from mergekit_lit.theory.terms import (
    LARGEST_STEP,
    LARGEST_TRAVEL,
    descent,
    divergence,
    drift,
    drift_in_closed_form,
    merged_gradient,
    merged_noise,
    mismatch,
    overshoot,
    progress,
)

TOTAL = (
    *("progress", "drift", "overshoot", "mismatch", "merged_noise", "divergence"),
    "generalization",
)
"""The terms that add up to the total."""
BY_STEP = ("descent", "generalization")
"""The terms of the total by the step itself."""
_NO_SUM = "the merge is no sum of scaled deltas"
_BY_PATH = (
    *(name for name in TOTAL if name != "generalization"),
    *("drift_closed_form", "delta2_by_path"),
)


@dataclass(frozen=True)
class Bound:
    """The terms of the bound for one merge.

    Attributes:
        terms: by name, in the order in which they are told.
        weighing: A_eff, w and the divergences.
        total: their sum as `bound` defines it; None unless every term of it is known, and where the
            merge is no sum of scaled deltas.
        total_by_step: descent + generalization; None unless both are known.
        by_task: each expert's part (`terms_by_task`).
        violated: assumptions that the run breaks, one sentence each.
        effective: whether an adaptive optimizer, or clipping, makes everything derived from travels
            effective.
    """

    terms: Mapping[str, Term]
    weighing: Weighing
    total: float | None
    total_by_step: float | None = None
    by_task: Sequence[Mapping[str, float | None]] = ()
    violated: tuple[str, ...] = ()
    effective: bool = False


def bound(
    experts: Sequence[ExpertFacts],
    merge: MergeFacts,
    coefficients: Sequence[float] | Sequence[Block],
    *,
    p: Sequence[float] | None = None,
) -> Bound:
    """Return every term of the excess-error bound of a merge, each with its provenance.

    E[F(x_avg) - F*] <= progress + drift + overshoot + mismatch + merged noise + divergence
                        + generalization

        progress        F~_S(x0) - (A_eff / 4) ||grad F~_S(x0)||^2
        drift           (A_eff L^2 / 2) sum_i w_i d_i^2, or (A_eff / 2) sum_i w_i of the measured
                        gradient drift
        overshoot       (L - 1 / A_eff) ||x_avg - x0||^2 / 2 where A_eff L > 1, else 0
        merged noise    L sum_i lambda_i^2 sum_k (eta_k a_k)^2 sigma_i^2 / b_i
        divergence      sqrt(chi2_w Var_{i~w} F_Si(x_avg)), the losses at the best point taken as 0
        generalization  the smaller of sqrt(2 L F_S) Delta + L Delta^2 / 2 and
                        G Delta + L Delta^2 / 2, Delta^2 = sum_i p_i (lambda_i^2 eps_i^2 + eps_h^2)

    The closed form of the drift stands beside the measured one where it is proved, and is called
    vacuous elsewhere. ||grad F_S(x_avg)||^2, the source's own optimization error, is a term by
    itself. A total is given only if each of its terms is known.

    Once the experts are there, their deltas tell more than their trainings do. Beside the total
    stands a second one, whose first part bounds F_S(x_avg) for any merge and travel:

        descent         F_S(x0) + <grad F_S(x0), x_avg - x0> + (L / 2) ||x_avg - x0||^2

    Coefficients lambda_i^l that differ by block l of the parameters: block l moves by A_l =
    sum_i lambda_i^l s_i down the objective with shares w_i^l = lambda_i^l s_i / A_l. The descent
    lemma, block by block (A_l L <= 1/2), gives

        progress        F~_S(x0) - sum_l (A_l / 4) ||grad^l F~_S(x0)||^2, F~ by the mean lambda_i
        mismatch        sum_l (A_l / 2) (2 sqrt(D_l) M_l + M_l^2), M_l the gradient's difference
                        between the block's own objective and F~; 0 where all blocks agree

    and in the other terms the mean of lambda_i^l over the blocks in the place of lambda_i, the mean
    of its square in that of lambda_i^2. That is proved for a Hessian without entries between blocks
    and for each block's own d_i^2, sigma_i^2 and eps_i^2; that a block's part of these is its part
    m_i^l of ||tau_i||^2 is our assumption. Without either, those terms are at most what the largest
    lambda_i^l gives, which their notes tell.

    Args:
        experts: T experts.
        merge: of the merge and the loss.
        coefficients: lambda_i, or blocks with theirs. Theory takes them to be at least 0 with sum
            1; other merges are our extension, and said so.
        p: weights of the tasks in the target; None for 1/T each.

    Raises:
        ValueError: see `weigh`; or a constant that is negative or not finite.

    Source: our reconstruction of the bound of arXiv 2601.21690, after Lei & Ying 2020
    (arXiv:2006.08157) and Wang et al. 2020 (arXiv:2007.07481).
    """
    check_facts(experts, merge)
    weighing = _weighing(coefficients, [expert.travel for expert in experts], p)
    terms = [
        progress(weighing, experts, merge),
        drift(weighing, experts, merge),
        drift_in_closed_form(weighing, experts, merge),
        overshoot(weighing, merge),
        mismatch(weighing, experts, merge),
        merged_noise(weighing, experts, merge),
        merged_gradient(merge),
        descent(weighing, experts, merge),
        divergence(weighing, experts),
        delta(weighing, experts, merge),
        delta_by_refits(experts, merge),
        delta_by_path(weighing, experts),
    ]
    named = {term.name: term for term in terms} | _limited(terms, weighing, experts, merge)
    named |= generalization(weighing, experts, merge, named["delta2"])
    if not merge.linear:
        # What the formulas give is the plain average's.
        named |= {name: Term(name, None, "unknown", _NO_SUM) for name in _BY_PATH}
        weighing = _without_path(weighing)
    return Bound(
        terms=named,
        weighing=weighing,
        total=sum_of([named[name].value for name in TOTAL]),
        total_by_step=sum_of([named[name].value for name in BY_STEP]),
        by_task=terms_by_task(weighing, experts, merge),
        violated=_violated(weighing, experts, merge),
        effective=any(expert.adaptive or expert.clipped for expert in experts),
    )


def _weighing(
    coefficients: Sequence[float] | Sequence[Block],
    travels: Sequence[float | None],
    p: Sequence[float] | None,
) -> Weighing:
    blocks = [each for each in coefficients if isinstance(each, Block)]
    if blocks:
        return weigh_blocks(blocks, travels, p=p)
    return weigh([each for each in coefficients if not isinstance(each, Block)], travels, p=p)


def _without_path(weighing: Weighing) -> Weighing:
    """Return a weighing that tells no travel, shares and divergences."""
    return replace(
        weighing,
        a_eff=None,
        w=None,
        chi2_lambda=None,
        chi2_w=None,
        tv_lambda=None,
        tv_w=None,
        blocks={},
    )


def _limited(
    terms: Sequence[Term], weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> dict[str, Term]:
    """Return the terms that take means over blocks, with what they are at most in their notes."""
    if not weighing.blocks:
        return {}
    most = weigh(weighing.largest, [expert.travel for expert in experts], p=weighing.p)
    largest = [of(most, experts, merge) for of in (drift, merged_noise, delta)]
    limits = {
        term.name: f"by parts of the displacement; at most {term.value:.3g}"
        for term in largest
        if term.value is not None
    }
    return {
        term.name: replace(term, note=joined(limits[term.name], term.note))
        for term in terms
        if term.name in limits and term.value is not None
    }


def _violated(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> tuple[str, ...]:
    """Return the assumptions that do not hold, one sentence each."""
    return (
        *_of_merge(weighing, merge),
        *_of_smoothness(weighing, experts, merge.smoothness),
        *_of_experts(experts),
    )


def _of_merge(weighing: Weighing, merge: MergeFacts) -> Iterator[str]:
    rows = [each.coefficients for each in (weighing.blocks.values() or [weighing])]
    off = max((math.fsum(row) for row in rows), key=lambda total: abs(total - 1.0))
    if not any(map(any, rows)):
        yield "All coefficients are 0: the merge is the base, and only its own loss is bounded."
    elif weighing.negative or not math.isclose(off, 1.0, rel_tol=1e-6):
        yield (
            f"Coefficients sum to {off:.3g}: the source takes them >= 0 with sum 1; this is our "
            "extension."
        )
    if not merge.linear:
        yield (
            "The merge is no sum of scaled deltas: progress, drift, noise and divergence are those "
            "of a path, and it has none; the total by the step stands."
        )
    if not merge.fixed:
        yield (
            "What the method does was found on images: the theory takes that as fixed, and refits, "
            "which see the same images, tell the stability through the experts alone."
        )
    if merge.recalibrated:
        yield (
            "BatchNorm statistics were estimated on training images: the theory takes all but the "
            "experts as fixed, and Delta, refits included, tells the stability without them."
        )


def _of_smoothness(
    weighing: Weighing, experts: Sequence[ExpertFacts], smooth: float | None
) -> Iterator[str]:
    if smooth is None:
        return
    fast = max((e.lr for e in experts if e.lr is not None), default=0.0)
    if fast * smooth > 2:
        yield f"eta L = {fast * smooth:.3g} exceeds 2: gradient descent is not stable."
    far = max((e.travel for e in experts if e.travel is not None), default=0.0)
    if far * smooth > LARGEST_TRAVEL:
        yield f"eta K L = {far * smooth:.3g} exceeds 0.306: the drift has no closed form."
    farthest = weighing.farthest
    if farthest is not None and farthest * smooth > LARGEST_STEP:
        yield (
            f"A_eff L = {farthest * smooth:.3g} exceeds 0.5: no progress is proved, and beyond 1 "
            "the length of the step is charged."
        )


def _of_experts(experts: Sequence[ExpertFacts]) -> Iterator[str]:
    chaotic = sum(expert.chaotic for expert in experts)
    if chaotic:
        yield (
            f"The twins of {chaotic} of {len(experts)} experts went less than 10 times as far as "
            "the rounding twin: replacing a sample tells nothing there."
        )
    if any(expert.adaptive for expert in experts):
        yield "An adaptive optimizer has no steps that the data do not change."
    clipped = sum(expert.clipped for expert in experts)
    if clipped:
        yield (
            f"Gradients of {clipped} of {len(experts)} experts were clipped: their steps' weights "
            "depend on the data, and what rests on travels is effective."
        )
    heads = sum(expert.trained_head for expert in experts)
    if heads:
        yield (
            f"The heads of {heads} of {len(experts)} experts were trained: F_Si(x0) is under the "
            "trained head, and L, G^2 and slopes are the backbone's; Delta holds the heads too."
        )
    for own in sorted({expert.own_objective for expert in experts} - {""}):
        yield f"Experts descended another loss than the one that is measured: {own}."
