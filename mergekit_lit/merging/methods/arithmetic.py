"""This file is arithmetic on task vectors: sums of deltas, scaled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import Structure
from mergekit_lit.merging.configuration import check_scale
from mergekit_lit.merging.passes import reduced, squared_lengths
from mergekit_lit.merging.steps import moved


@MERGE_METHODS.add(
    form="linear",
    family="arithmetic",
    data="none",
    source="Ilharco et al. 2023, arXiv:2212.04089, sec. 2",
    search={"scale": (0.0, 1.5)},
    homogeneous=True,
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
    Differs: no expert is subtracted to forget its task: scales are at least 0.
    """
    check_scale(scale)
    return torch.full((len(experts),), float(scale), dtype=torch.float64)


@MERGE_METHODS.add(
    form="linear",
    family="arithmetic",
    data="none",
    source="Zhou et al. 2024, arXiv:2406.11385 (MetaGPT)",
    search={"scale": (0.0, 4.0)},
    homogeneous=True,
)
def metagpt(experts: Experts, *, scale: float = 1.0) -> Tensor:
    """Add the deltas, each weighed by its share of the squared lengths.

    lambda_t = scale * ||tau_t||^2 / sum_k ||tau_k||^2

    It minimises sum_t ||tau_t||^2 ||theta - theta_t||^2, a bound on the tasks' losses whose
    curvature along a task vector grows with its length, where the tau_t are orthogonal: there
    ||theta - theta_t||^2 = sum_k lambda_k^2 ||tau_k||^2 - 2 lambda_t ||tau_t||^2 + ||tau_t||^2, and
    the derivative in lambda_k, 2 ||tau_k||^2 (lambda_k sum_t ||tau_t||^2 - ||tau_k||^2), is 0.
    Equal weights in the sum would give the average, lambda_t = 1/T.

    Args:
        experts: T experts of one base.
        scale: sum of the coefficients, >= 0; 1 is the paper's.

    Returns:
        Coefficients lambda, (T,).

    Source: Zhou et al. 2024, arXiv:2406.11385 (model exclusive task arithmetic).
    Differs: experts that all equal the base share alike.
    """
    check_scale(scale)
    squares = torch.zeros(len(experts), dtype=torch.float64)
    for name in experts.merged_names():
        squares = squares + squared_lengths(experts, name)
    if not bool(squares.any()):
        squares = torch.ones_like(squares)
    return scale * squares / squares.sum()


def _check(_experts: Experts, *, alpha: float | None, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and value < 0:
            raise ValueError(f"`{name}` must be at least 0, but is {value!r}.")


@MERGE_METHODS.add(
    form="whole",
    family="arithmetic",
    data="none",
    source="Wang et al. 2024, arXiv:2410.17146 (LiNeS)",
    search={"beta": (0.0, 1.5)},
    check=_check,
)
def lines(experts: Experts, *, alpha: float | None = None, beta: float = 0.3) -> Merged:
    """Add all deltas, the deeper the block the more of them.

    theta^l = theta_0^l + (alpha + beta l / (L - 1)) sum_t tau_t^l,  block l = 0 ... L - 1

    Args:
        experts: T experts of one base.
        alpha: scale in the first block, and of tensors outside the blocks, >= 0. Null is 1/T.
        beta: how much more of the deltas the last block takes, >= 0.

    Returns:
        The merged model.

    Source: Wang et al. 2024, arXiv:2410.17146 (LiNeS for multi-task merging).
    Differs: alpha is 1/T; the published code multiplies it by the ratio of the summed deltas' L1
        norm to the merged step's, 1 where they are one.
    """
    _check(experts, alpha=alpha, beta=beta)
    alpha = 1 / len(experts) if alpha is None else alpha
    scales = depth_scales(experts.structure, alpha, beta)
    steps = (
        (name, scales[name] * reduced(experts, name, lambda deltas: deltas.sum(dim=0)))
        for name in experts.merged_names()
    )
    rows = {name: [scales[name]] * len(experts) for name in experts.merged_names()}
    return Merged(
        shared=moved(experts.base, steps),
        structure=experts.structure,
        facts={"coefficients_by_tensor": rows},
    )


def depth_scales(structure: Structure, alpha: float, beta: float) -> Mapping[str, float]:
    """Return alpha + beta * l / (L - 1) for the tensors of block l of L, alpha for the others."""
    outside = ("stem", "final")
    depths = sorted({info.depth for info in structure.values() if info.group not in outside})
    place = {depth: index / max(1, len(depths) - 1) for index, depth in enumerate(depths)}
    return {
        name: alpha if info.group in outside else alpha + beta * place[info.depth]
        for name, info in structure.items()
    }
