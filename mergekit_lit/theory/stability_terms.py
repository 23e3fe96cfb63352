"""This file is the terms of the bound that stability makes: Delta, and what it adds to the loss.

Symbols are those of `theory.terms`.
"""

import math
from collections.abc import Sequence

from mergekit_lit.theory.coefficients import Weighing
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts
from mergekit_lit.theory.term import Term, joined, sum_of, term_of, weighted

_CHAOTIC = "needs twins further off than the rounding twin"


def delta(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return Delta^2 = sum_i p_i (lambda_i^2 eps_i^2 + eps_h^2), or that of the merged refits.

    The formula takes lambda_i to stay when a sample is replaced.
    """
    if any(expert.chaotic for expert in experts):
        return Term("delta2", None, "unknown", _CHAOTIC)
    if not (merge.linear and merge.fixed):
        heads = sum_of([_head(p, e) for p, e in zip(weighing.p, experts, strict=True)])
        needs = {"Delta_M^2 of refits": merge.delta2_of_merge, "eps_head^2": heads}
        note = joined("by the merge of the refits", _same(merge), _unchecked(experts))
        return term_of("delta2", needs, lambda d, h: d + h, note)
    parts = [
        None
        if expert.eps2 is None or expert.eps2_head is None
        else p * (square * expert.eps2 + expert.eps2_head)
        for p, square, expert in zip(weighing.p, weighing.squares, experts, strict=True)
    ]
    return term_of("delta2", {"eps^2": sum_of(parts)}, lambda d: d, _unchecked(experts))


def _head(p: float, expert: ExpertFacts) -> float | None:
    return None if expert.eps2_head is None else p * expert.eps2_head


def delta_by_refits(experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return Delta_M^2 of the backbone, from the merge of the refits, linear or not."""
    if any(expert.chaotic for expert in experts):
        return Term("delta2_by_refits", None, "unknown", _CHAOTIC)
    needs = {"refits": merge.delta2_of_merge}
    note = joined(_same(merge), _unchecked(experts))
    return term_of("delta2_by_refits", needs, lambda d: d, note)


def _same(merge: MergeFacts) -> str:
    """Return what the merges of the refits leave out."""
    if not merge.looks_at:
        return ""
    return f"through the experts alone: refits see the same {merge.looks_at}"


def _unchecked(experts: Sequence[ExpertFacts]) -> str:
    """Return that what was measured may be the rounding's doing, where nobody looked."""
    count = sum(expert.unchecked for expert in experts)
    if not count:
        return ""
    return f"no rounding twin: of {count} of {len(experts)} experts it may be rounding alone"


def delta_by_path(weighing: Weighing, experts: Sequence[ExpertFacts]) -> Term:
    """Return Delta^2 with the path estimate of the backbones' stability in place of twins."""
    parts = [
        None if expert.eps2_path is None else p * square * expert.eps2_path
        for p, square, expert in zip(weighing.p, weighing.squares, experts, strict=True)
    ]
    note = "an estimate of its size, not calibrated by twins; without the heads"
    return term_of("delta2_by_path", {"eps_path": sum_of(parts)}, lambda d: d, note)


def generalization(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts, delta2: Term
) -> dict[str, Term]:
    """Return both forms of the generalization term, and the smaller.

    sqrt(2 L F_S) Delta + L Delta^2 / 2  and  G Delta + L Delta^2 / 2
    """
    smooth = merge.smoothness
    loss = weighted(weighing.p, [expert.train_loss for expert in experts])
    by_loss = term_of(
        "generalization_by_loss",
        {"L": smooth, "F_S(x_avg)": loss, "Delta^2": delta2.value},
        lambda el, f, d: math.sqrt(2 * el * f * d) + el * d / 2,
    )
    by_gradient = term_of(
        "generalization_by_gradient",
        {"L": smooth, "G^2": merge.sample_gradient2, "Delta^2": delta2.value},
        lambda el, g, d: math.sqrt(g * d) + el * d / 2,
    )
    known = [term for term in (by_loss, by_gradient) if term.value is not None]
    if known:
        least = min(known, key=lambda term: term.value or 0.0)
        best = Term("generalization", least.value, "measured", least.name)
    else:
        best = Term("generalization", None, "unknown", by_loss.note)
    return {term.name: term for term in (by_loss, by_gradient, best)}
