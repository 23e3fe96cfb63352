"""This file is arithmetic on task vectors: sums of deltas, scaled."""

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_scale


@MERGE_METHODS.add(
    form="linear",
    family="arithmetic",
    data="none",
    source="Ilharco et al. 2023, arXiv:2212.04089, sec. 2",
    search={"scale": (0.0, 1.5)},
)
def task_arithmetic(experts: Experts, *, scale: float = 0.3) -> Tensor:
    """Add all deltas, with one scale.

    theta = theta_0 + scale * sum_t tau_t, so lambda_t = scale

    Args:
        experts: T experts of one base.
        scale: length of the step, >= 0; 0 gives the base, 1/T the average. About 0.3 suits 8
            experts; more experts want less.

    Returns:
        Coefficients lambda, (T,).

    Source: Ilharco et al. 2023, arXiv:2212.04089, sec. 2.
    """
    check_scale(scale)
    return torch.full((len(experts),), float(scale), dtype=torch.float64)
