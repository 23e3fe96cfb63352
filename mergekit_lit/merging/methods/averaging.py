"""This file is the averages of experts: equal, weighted, and corrected for unequal travel."""

import math

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_scale
from mergekit_lit.merging.steps import shares_of


@MERGE_METHODS.add(
    form="linear",
    family="averaging",
    data="none",
    source="Wortsman et al. 2022, arXiv:2203.05482, sec. 2 (uniform soup)",
)
def average(experts: Experts) -> Tensor:
    """Average all experts.

    theta = (1/T) sum_t theta_t, so lambda_t = 1/T

    Args:
        experts: T experts of one base.

    Returns:
        Coefficients lambda, (T,).

    Source: Wortsman et al. 2022, arXiv:2203.05482, sec. 2 (uniform soup).
    Differs: there all runs learn one task; here each expert has its own, and keeps its head.
    """
    return shares_of(None, len(experts))


@MERGE_METHODS.add(
    form="linear",
    family="averaging",
    data="none",
    source="McMahan et al. 2017, arXiv:1602.05629, alg. 1",
    # What it is with its defaults: a table of all methods need not show both.
    by_default="average",
)
def weighted_average(experts: Experts, *, weights: list[float] | None = None) -> Tensor:
    """Average the experts with a weight for each.

    theta = sum_t p_t theta_t,  p_t = w_t / sum_s w_s, so lambda = p

    Args:
        experts: T experts of one base.
        weights: w, one number >= 0 per expert in the order of the experts, of any sum > 0: they
            are divided by it. Null weighs all experts alike.

    Returns:
        Coefficients lambda, (T,), which sum to 1.

    Source: McMahan et al. 2017, arXiv:1602.05629, alg. 1.
    Differs: the weights are the caller's; there they are the numbers of training samples.
    """
    return shares_of(weights, len(experts), experts.names)


@MERGE_METHODS.add(
    form="linear",
    family="averaging",
    data="cards",
    source="Our reconstruction, after Wang et al. 2020, arXiv:2007.07481 (FedNova)",
    search={"scale": (0.0, 4.0)},
    homogeneous=True,
)
def travel_normalised(
    experts: Experts, *, scale: float = 1.0, weights: list[float] | None = None
) -> Tensor:
    """Average the experts so that those which travelled far count for no more than their share.

    lambda_t = scale * (p_t / s_t) / sum_r (p_r / s_r),  s_t = eta_t ||a_t||_1

    Expert t descended its own loss for a travel s_t, so the merge descends
    sum_t lambda_t s_t F_t: with these lambda that is the target sum_t p_t F_t, whatever the
    learning rates, steps and momenta (the divergence chi2_w is zero).

    Args:
        experts: T experts of one base, each with a travel on its card.
        scale: sum of the coefficients, >= 0; 1 is an average.
        weights: p, the share of each task in the target, one number >= 0 per expert in the order
            of the experts; divided by their sum. Null shares alike.

    Returns:
        Coefficients lambda, (T,), which sum to `scale`.

    Source: our reconstruction (R2), after Wang et al. 2020, arXiv:2007.07481 (FedNova).
    Differs: FedNova averages after each of many rounds; here it is done once.
    """
    check_scale(scale)
    travel = torch.tensor([_travel(experts, t) for t in range(len(experts))], dtype=torch.float64)
    # Only the ratios of the travels matter; dividing by the least keeps every quotient in range.
    slowness = shares_of(weights, len(experts), experts.names) * (travel.min() / travel)  # (T,)
    return scale * slowness / slowness.sum()


def _travel(experts: Experts, t: int) -> float:
    """Return eta_t ||a_t||_1 from the card of expert t."""
    travel = experts.cards[t].travel
    if travel is None:
        raise ValueError(
            "`travel_normalised` needs the travel eta ||a||_1 of every expert, but the card of "
            f"{experts.names[t]!r} has none (adaptive optimizer, or a foreign file). "
            "Train it with sgd, or merge with `weighted_average`."
        )
    if not (travel > 0 and math.isfinite(travel)):
        raise ValueError(
            f"The travel of {experts.names[t]!r} must be positive, but its card says {travel!r}. "
            "Leave this expert out, or merge with `weighted_average`."
        )
    return travel
