"""This file is the terms of the bound but for stability's: our reconstruction of the bound.

Symbols: T experts from x0; expert i took K_i steps of rate eta_i over batches of b_i from n_i
samples, with effective step vector a_i; s_i = eta_i ||a_i||_1 is its travel. The merge is
x_avg = x0 + sum_i lambda_i tau_i. `theory.coefficients.weigh` gives A_eff and w.

Where coefficients differ by block l of the parameters, lambda_i stands for its mean over the
expert's displacement and lambda_i^2 for the mean square (`weigh_blocks`).
"""

import math
from collections.abc import Sequence

from mergekit_lit.theory.coefficients import Weighing
from mergekit_lit.theory.facts import ALL, ExpertFacts, Gram, MergeFacts
from mergekit_lit.theory.term import Term, sum_of, term_of, weighted

LARGEST_TRAVEL = 0.306
"""Largest eta_i K_i L for which the closed form of the drift is proved."""
LARGEST_STEP = 0.5
"""Largest A_eff L for which progress is proved."""
LONGEST_STEP = 1.0
"""Largest A_eff L beyond which the length of the step itself is charged."""
_NEGATIVE = "needs coefficients of at least 0"
_NOTHING = 1e-12  # chi2_w of what rounding leaves of equal shares


def progress(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return F~_S(x0) - sum_l (A_l / 4) ||grad^l F~_S(x0)||^2; without blocks A_l is A_eff.

    The gain is proved for A_l L <= 0.5 alone, and left out where that fails: it would go on growing
    with A_l, below a loss of 0.
    """
    if weighing.negative:
        return Term("progress", None, "unknown", _NEGATIVE)
    start, slope = weighted(weighing.w, [e.base_loss for e in experts]), _slope(weighing, merge)
    step = (weighing.farthest or 0.0) * (merge.smoothness or 0.0)
    if start is not None and step > LARGEST_STEP:
        return Term("progress", start, "measured", "without a gain: A_eff L exceeds 0.5")
    needs = {"A_eff": weighing.a_eff, "F_Si(x0)": start, "grad F_Si(x0)": slope}
    return term_of("progress", needs, lambda _, f, g: f - g / 4)


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
    if weighing.negative:
        return Term("mismatch", None, "unknown", _NEGATIVE)
    gram, w, d2 = merge.gram or {}, weighing.w or (), [expert.d2 or 0.0 for expert in experts]

    def of_blocks(smooth: float, *_: float) -> float:
        return math.fsum(
            _mismatch_of(block, gram[name], w, [smooth**2 * d for d in d2])
            for name, block in weighing.blocks.items()
        )

    known = {
        "L": merge.smoothness,
        "A_eff": weighing.a_eff,
        "d^2": sum_of([expert.d2 for expert in experts]),
        "gradients by block": None if merge.gram is None else 0.0,
    }
    return term_of("mismatch", known, of_blocks)


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
    if weighing.negative:
        return Term("drift", None, "unknown", _NEGATIVE)
    if merge.gradient_drift is not None and weighing.w is not None:
        moved = math.fsum(w * d for w, d in zip(weighing.w, merge.gradient_drift, strict=True))
        return term_of("drift", {"A_eff": weighing.a_eff}, lambda a: a / 2 * moved, "by gradients")
    return term_of(
        "drift",
        {
            "A_eff": weighing.a_eff,
            "L": merge.smoothness,
            "d^2": weighted(weighing.w, [expert.d2 for expert in experts]),
        },
        lambda a, smooth, d2: a * smooth**2 / 2 * d2,
        "by displacements",
    )


def overshoot(weighing: Weighing, merge: MergeFacts) -> Term:
    """Return sum_l (L - 1 / A_l) ||x_avg^l - x0^l||^2 / 2 over blocks with A_l L > 1, else 0.

    Up to A_l L = 1 what a step descends pays for its length; what is longer costs the rest of
    L ||step||^2 / 2, without which progress and drift would bound nothing.
    """
    blocks = weighing.blocks or {ALL: weighing}
    travels = {name: block.a_eff for name, block in blocks.items()}
    smooth, step2 = merge.smoothness, merge.step2
    known = [a for a in travels.values() if a is not None]
    if smooth is not None and len(known) == len(travels) and max(known) * smooth <= LONGEST_STEP:
        return Term("overshoot", 0.0, "closed form", "A_eff L is at most 1")
    if weighing.negative:
        return Term("overshoot", None, "unknown", _NEGATIVE)

    def beyond(smooth: float, *_: float) -> float:
        return math.fsum(
            (smooth - 1 / a) / 2 * (step2 or {})[name]
            for name, a in travels.items()
            if a and a * smooth > LONGEST_STEP
        )

    there = step2 is not None and set(travels) <= set(step2)
    needs = {
        "L": smooth,
        "A_eff": weighing.a_eff,
        "||x_avg - x0||^2": 0.0 if there else None,
    }
    return term_of("overshoot", needs, beyond, "A_eff L exceeds 1")


def drift_in_closed_form(
    weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts
) -> Term:
    """Return the proved form of the drift, noise and heterogeneity; vacuous where not proved.

    (A_eff L^2 / 2) sum_i w_i [2 sum_k (eta_k a_k)^2 sigma_i^2 / b_i + (16 / 3) s_i^2 zeta~_i^2],
    zeta~_i^2 <= 2 zeta_i^2 + 2 sum_j w_j zeta_j^2; for plain SGD the first sum is eta^2 (K - 1).
    """
    name, smooth = "drift_closed_form", merge.smoothness
    if len({block.coefficients for block in weighing.blocks.values()}) > 1:
        return Term(name, None, "vacuous", "proved for one coefficient an expert")
    zeta = weighted(weighing.w, [expert.zeta2 for expert in experts])
    parts = [_noise_on_the_way(expert) for expert in experts]
    noise = weighted(weighing.w, parts)
    missing = {"A_eff": weighing.a_eff, "L": smooth, "sigma^2": noise, "zeta^2": zeta}
    if smooth is None or weighing.a_eff is None or noise is None or zeta is None:
        return term_of(name, missing, lambda *_: 0.0)
    travels = [expert.travel or 0.0 for expert in experts]
    if max(travels) * smooth > LARGEST_TRAVEL or weighing.a_eff * smooth > LARGEST_STEP:
        why = f"eta K L = {max(travels) * smooth:.3g}, A_eff L = {weighing.a_eff * smooth:.3g}"
        return Term(name, None, "vacuous", f"proved for eta K L <= 0.306, A_eff L <= 0.5; {why}")
    apart = weighted(
        weighing.w,
        [
            16 / 3 * s**2 * (2 * (expert.zeta2 or 0.0) + 2 * zeta)
            for s, expert in zip(travels, experts, strict=True)
        ],
    )
    value = weighing.a_eff * smooth**2 / 2 * (noise + (apart or 0.0))
    if value < 0:
        # U-statistics of sigma^2 and zeta^2 may come out negative, a drift may not.
        return Term(name, 0.0, "closed form", "estimates of sigma^2 and zeta^2 are below 0")
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
    return term_of(
        "merged_noise",
        {"L": merge.smoothness, "travel and sigma^2": sum_of(parts)},
        lambda smooth, noise: smooth * noise,
    )


def merged_gradient(merge: MergeFacts) -> Term:
    """Return ||grad F_S(x_avg)||^2, the source's optimization error."""
    return term_of(
        "merged_gradient", {"||grad F_S(x_avg)||^2": merge.merged_gradient2}, lambda g: g
    )


def divergence(weighing: Weighing, experts: Sequence[ExpertFacts]) -> Term:
    """Return sqrt(chi2_w Var_{i~w} F_Si(x_avg)), the losses at the best point taken as 0."""
    if weighing.negative:
        return Term("divergence", None, "unknown", _NEGATIVE)
    if weighing.chi2_w is not None and weighing.chi2_w <= _NOTHING:
        return Term("divergence", 0.0, "closed form", "chi2_w is 0")
    losses = [expert.train_loss for expert in experts]
    mean = weighted(weighing.w, losses)
    spread = None
    if mean is not None:
        squares = [None if loss is None else (loss - mean) ** 2 for loss in losses]
        spread = weighted(weighing.w, squares)
    return term_of(
        "divergence",
        {"chi2_w": weighing.chi2_w, "train losses": spread},
        lambda chi2, variance: math.sqrt(max(0.0, chi2 * variance)),
    )


def descent(weighing: Weighing, experts: Sequence[ExpertFacts], merge: MergeFacts) -> Term:
    """Return sum_i p_i (F_Si(x0) + <grad F_Si(x0), x_avg - x0>) + (L / 2) ||x_avg - x0||^2.

    What bounds F_S(x_avg) by the step itself, however it was made: for any merge, linear or not, of
    any travel, without a surrogate and hence without divergence. L must be that of one function:
    x0 and x_avg are looked at under the same BatchNorm statistics, the merge's.

    Source: the descent lemma, as in Nesterov 2004, Lemma 1.2.3.
    """
    needs = {
        "F_Si(x0)": weighted(weighing.p, [expert.base_loss for expert in experts]),
        "<grad F_Si(x0), x_avg - x0>": weighted(weighing.p, [expert.slope for expert in experts]),
        "||x_avg - x0||^2": None if merge.step2 is None else math.fsum(merge.step2.values()),
        "L": merge.smoothness,
    }
    return term_of("descent", needs, lambda f, slope, step2, smooth: f + slope + smooth / 2 * step2)
