"""This file is the terms of the bound, one function each: our reconstruction of the bound.

Symbols: T experts from x0; expert i took K_i steps of rate eta_i over batches of b_i from n_i
samples, with effective step vector a_i; s_i = eta_i ||a_i||_1 is its travel. The merge is
x_avg = x0 + sum_i lambda_i tau_i. `theory.coefficients.weigh` gives A_eff and w.

Where coefficients differ by block l of the parameters, lambda_i stands for its mean over the
expert's displacement and lambda_i^2 for the mean square (`weigh_blocks`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mergekit_lit.theory.coefficients import Weighing
from mergekit_lit.theory.facts import ALL, ExpertFacts, Gram, MergeFacts

Provenance: TypeAlias = Literal["measured", "closed form", "vacuous", "unknown"]
LARGEST_TRAVEL = 0.306
"""Largest eta_i K_i L for which the closed form of the drift is proved."""
LARGEST_STEP = 0.5
"""Largest A_eff L for which progress is proved."""


@dataclass(frozen=True)
class Term:
    """One term of the bound.

    Attributes:
        name: what it is.
        value: the number; None where unknown or vacuous.
        provenance: where the number comes from.
        note: why it is unknown or vacuous, or what it rests on.
    """

    name: str
    value: float | None
    provenance: Provenance
    note: str = ""


def progress(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return F~_S(x0) - sum_l (A_l / 4) ||grad^l F~_S(x0)||^2; without blocks A_l is A_eff.

    The gain is proved for A_l L <= 0.5 alone, and left out where that fails: it would go on growing
    with A_l, below a loss of 0.
    """
    start, slope = _weighted(weighing.w, [e.base_loss for e in experts]), _slope(weighing, merge)
    step = (weighing.farthest or 0.0) * (merge.smoothness or 0.0)
    if start is not None and step > LARGEST_STEP:
        return Term("progress", start, "measured", "without a gain: A_eff L exceeds 0.5")
    needs = {"A_eff": weighing.a_eff, "F_Si(x0)": start, "grad F_Si(x0)": slope}
    return _term("progress", needs, lambda _, f, g: f - g / 4)


def _slope(weighing: Weighing, merge: MergeFacts) -> float | None:
    """Return sum_l A_l ||grad^l F~_S(x0)||^2."""
    w, gram = weighing.w, merge.gram
    if w is None or gram is None:
        return None
    blocks = weighing.blocks or {ALL: weighing}
    return math.fsum((b.a_eff or 0.0) * _square(gram[name], w) for name, b in blocks.items())


def mismatch(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return what it costs that each block descends an objective of its own; 0 without blocks.

    sum_l (A_l / 2) (2 sqrt(D_l) M_l + M_l^2),  M_l = ||sum_i (w_i^l - w_i) grad^l F_Si(x0)||,
    D_l = L^2 sum_i w_i^l m_i^l d_i^2, the drift within the block
    """
    if not weighing.blocks:
        return Term("mismatch", 0.0, "closed form", "one coefficient an expert")
    if min(min(block.coefficients) for block in weighing.blocks.values()) < 0:
        return Term("mismatch", None, "unknown", "needs coefficients of at least 0")
    gram, w, d2 = merge.gram or {}, weighing.w or (), [expert.d2 or 0.0 for expert in experts]

    def of_blocks(smooth: float, *_: float) -> float:
        return math.fsum(
            _mismatch_of(block, gram[name], w, [smooth**2 * d for d in d2])
            for name, block in weighing.blocks.items()
        )

    known = {
        "L": merge.smoothness,
        "A_eff": weighing.a_eff,
        "d^2": _sum([expert.d2 for expert in experts]),
        "gradients by block": None if merge.gram is None else 0.0,
    }
    return _term("mismatch", known, of_blocks)


def _mismatch_of(block: Weighing, gram: Gram, w: Sequence[float], drifts: Sequence[float]) -> float:
    """Return one block's part; a block that stays at the base has none."""
    if not block.a_eff or block.w is None:
        return 0.0
    # A U-statistic of a squared norm may come out negative.
    apart = math.sqrt(max(0.0, _square(gram, [a - b for a, b in zip(block.w, w, strict=True)])))
    within = math.fsum(a * m * d for a, m, d in zip(block.w, block.moved, drifts, strict=True))
    return block.a_eff / 2 * (2 * math.sqrt(within) * apart + apart**2)


def _square(gram: Gram, weights: Sequence[float]) -> float:
    """Return ||sum_i w_i v_i||^2 from the inner products of the v_i."""
    return math.fsum(
        a * b * entry
        for a, row in zip(weights, gram, strict=True)
        for b, entry in zip(weights, row, strict=True)
    )


def drift(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return (A_eff L^2 / 2) sum_i w_i d_i^2, or (A_eff / 2) sum_i w_i of the gradients' drift."""
    if merge.gradient_drift is not None and weighing.w is not None:
        moved = math.fsum(w * d for w, d in zip(weighing.w, merge.gradient_drift, strict=True))
        return _term("drift", {"A_eff": weighing.a_eff}, lambda a: a / 2 * moved, "by gradients")
    return _term(
        "drift",
        {
            "A_eff": weighing.a_eff,
            "L": merge.smoothness,
            "d^2": _weighted(weighing.w, [expert.d2 for expert in experts]),
        },
        lambda a, smooth, d2: a * smooth**2 / 2 * d2,
        "by displacements",
    )


def drift_in_closed_form(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> Term:
    """Return the proved form of the drift, noise and heterogeneity; vacuous where not proved.

    (A_eff L^2 / 2) sum_i w_i [2 sum_k (eta_k a_k)^2 sigma_i^2 / b_i + (16 / 3) s_i^2 zeta~_i^2],
    zeta~_i^2 <= 2 zeta_i^2 + 2 sum_j w_j zeta_j^2; for plain SGD the first sum is eta^2 (K - 1).
    """
    name, smooth = "drift_closed_form", merge.smoothness
    if weighing.blocks:
        return Term(name, None, "vacuous", "proved for one coefficient an expert")
    zeta = _weighted(weighing.w, [expert.zeta2 for expert in experts])
    parts = [_noise_on_the_way(expert) for expert in experts]
    noise = _weighted(weighing.w, parts)
    missing = {"A_eff": weighing.a_eff, "L": smooth, "sigma^2": noise, "zeta^2": zeta}
    if smooth is None or weighing.a_eff is None or noise is None or zeta is None:
        return _term(name, missing, lambda *_: 0.0)
    travels = [expert.travel or 0.0 for expert in experts]
    if max(travels) * smooth > LARGEST_TRAVEL or weighing.a_eff * smooth > LARGEST_STEP:
        why = f"eta K L = {max(travels) * smooth:.3g}, A_eff L = {weighing.a_eff * smooth:.3g}"
        return Term(name, None, "vacuous", f"proved for eta K L <= 0.306, A_eff L <= 0.5; {why}")
    apart = _weighted(
        weighing.w,
        [
            16 / 3 * s**2 * (2 * (expert.zeta2 or 0.0) + 2 * zeta)
            for s, expert in zip(travels, experts, strict=True)
        ],
    )
    value = weighing.a_eff * smooth**2 / 2 * (noise + (apart or 0.0))
    return Term(name, value, "closed form")


def _noise_on_the_way(expert: ExpertFacts) -> float | None:
    """Return 2 eta^2 (K - 1) sigma^2 / b, with sum_k (eta_k a_k)^2 where SGD is not plain."""
    if expert.noise is None or expert.batch is None:
        return None
    if expert.plain_sgd is not None:
        lr, steps = expert.plain_sgd
        return 2 * lr**2 * (steps - 1) * expert.noise / expert.batch
    if expert.travel_squared is None:
        return None
    return 2 * expert.travel_squared * expert.noise / expert.batch


def merged_noise(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return L sum_i lambda_i^2 sum_k (eta_k a_k)^2 sigma_i^2 / b_i."""
    parts = [
        None
        if expert.travel_squared is None or expert.noise is None or expert.batch is None
        else square * expert.travel_squared * expert.noise / expert.batch
        for square, expert in zip(weighing.squares, experts, strict=True)
    ]
    return _term(
        "merged_noise",
        {"L": merge.smoothness, "travel and sigma^2": _sum(parts)},
        lambda smooth, noise: smooth * noise,
    )


def merged_gradient(merge: MergeFacts) -> Term:
    """Return ||grad F_S(x_avg)||^2, the source's optimization error."""
    return _term("merged_gradient", {"||grad F_S(x_avg)||^2": merge.merged_gradient2}, lambda g: g)


def divergence(weighing: Weighing, experts: Sequence[ExpertFacts]) -> Term:
    """Return sqrt(chi2_w Var_{i~w} F_Si(x_avg)), the losses at the best point taken as 0."""
    if weighing.chi2_w == 0:
        return Term("divergence", 0.0, "closed form", "chi2_w is 0")
    losses = [expert.train_loss for expert in experts]
    mean = _weighted(weighing.w, losses)
    spread = None
    if mean is not None:
        squares = [None if loss is None else (loss - mean) ** 2 for loss in losses]
        spread = _weighted(weighing.w, squares)
    return _term(
        "divergence",
        {"chi2_w": weighing.chi2_w, "train losses": spread},
        lambda chi2, variance: math.sqrt(max(0.0, chi2 * variance)),
    )


def delta(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return Delta^2 = sum_i p_i (lambda_i^2 eps_i^2 + eps_h^2), or that of the merged refits.

    The formula takes lambda_i to stay when a sample is replaced.
    """
    if any(expert.chaotic for expert in experts):
        return Term("delta2", None, "unknown", "needs twins further off than the rounding twin")
    if not (merge.linear and merge.fixed):
        heads = _sum([_head(p, e) for p, e in zip(weighing.p, experts, strict=True)])
        needs = {"Delta_M^2 of refits": merge.delta2_of_merge, "eps_head^2": heads}
        return _term("delta2", needs, lambda d, h: d + h, "by the merge of the refits")
    parts = [
        None
        if expert.eps2 is None or expert.eps2_head is None
        else p * (square * expert.eps2 + expert.eps2_head)
        for p, square, expert in zip(weighing.p, weighing.squares, experts, strict=True)
    ]
    return _term("delta2", {"eps^2": _sum(parts)}, lambda d: d)


def _head(p: float, expert: ExpertFacts) -> float | None:
    return None if expert.eps2_head is None else p * expert.eps2_head


def delta_by_refits(merge: MergeFacts) -> Term:
    """Return Delta_M^2 of the backbone, from the merge of the refits, linear or not."""
    return _term("delta2_by_refits", {"refits": merge.delta2_of_merge}, lambda d: d)


def delta_by_path(weighing: Weighing, experts: Sequence[ExpertFacts]) -> Term:
    """Return Delta^2 with the path estimate of the backbones' stability in place of twins."""
    parts = [
        None if expert.eps2_path is None else p * square * expert.eps2_path
        for p, square, expert in zip(weighing.p, weighing.squares, experts, strict=True)
    ]
    note = "an estimate of its size, not calibrated by twins; without the heads"
    return _term("delta2_by_path", {"eps_path": _sum(parts)}, lambda d: d, note)


def generalization(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts, delta2: Term
) -> dict[str, Term]:
    """Return both forms of the generalization term, and the smaller.

    sqrt(2 L F_S) Delta + L Delta^2 / 2  and  G Delta + L Delta^2 / 2
    """
    smooth = merge.smoothness
    loss = _weighted(weighing.p, [expert.train_loss for expert in experts])
    by_loss = _term(
        "generalization_by_loss",
        {"L": smooth, "F_S(x_avg)": loss, "Delta^2": delta2.value},
        lambda el, f, d: math.sqrt(2 * el * f * d) + el * d / 2,
    )
    by_gradient = _term(
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


def _term(
    name: str,
    needs: Mapping[str, float | None],
    formula: Callable[..., float],
    note: str = "",
) -> Term:
    """Return a term by its formula, or say what is missing."""
    missing = [symbol for symbol, value in needs.items() if value is None]
    if missing:
        return Term(name, None, "unknown", f"needs {', '.join(missing)}")
    return Term(name, formula(*needs.values()), "measured", note)


def _weighted(weights: Sequence[float] | None, values: Sequence[float | None]) -> float | None:
    if weights is None:
        return None
    return _sum([None if v is None else w * v for w, v in zip(weights, values, strict=True)])


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
