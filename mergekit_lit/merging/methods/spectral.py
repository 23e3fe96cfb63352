"""This file is the methods that act on singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS.

Linear weights and convolutions, the latter reshaped to (C_out, C_in * kh * kw), are decomposed in
float64; every other tensor takes the mean of the deltas, as the papers do.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.params import wide
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.threads import one_thread
from mergekit_lit.merging.configuration import check_interval, check_scale
from mergekit_lit.merging.decompositions import has_direction, leading, polar
from mergekit_lit.merging.methods.sparsify import Combine, by_sign
from mergekit_lit.merging.quantiles import threshold
from mergekit_lit.merging.steps import sum_of


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Gargiulo et al. 2025, arXiv:2412.00081, alg. 1",
    search={"scale": (0.0, 3.0)},
    homogeneous=True,
)
@one_thread()
def tsv_m(tensor: Slice, *, scale: float = 1.0) -> Tensor:
    """Keep each task's leading singular vectors, make them orthogonal across tasks, and sum.

    Delta_t ~ U_t S_t V_t^T (rank k = floor(min(m, n) / T)),  U = [U_1 ... U_T], V likewise,
    step = scale * polar(U) diag(S_1 ... S_T) polar(V)^T

    Args:
        tensor: deltas (T, *s); matrices are (m, n).
        scale: length of the step, unitless, >= 0; 1 is the paper's.

    Returns:
        The step, (*s).

    Source: Gargiulo et al. 2025, arXiv:2412.00081, alg. 1.
    Differs: convolutions are decomposed too; k is at least 1; directions that the tasks share
        exactly (a singular U) are shared among them, where an SVD would fill in arbitrary ones.
    """
    check_scale(scale)
    if not is_matrix(tensor):
        return scale * mean_of(tensor)
    count = len(tensor.each)
    rank = max(1, min(tensor.base.flatten(1).shape) // count)
    triplets = [leading(delta, rank) for delta in matrices(tensor)]
    left, values, right = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    known = has_direction(values)
    step = (polar(left * known) * values) @ polar(right * known).mT
    return scale * like(step, tensor)


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Marczak et al. 2025, arXiv:2502.04959, sec. 4.1",
    search={"scale": (0.0, 3.0)},
    homogeneous=True,
)
@one_thread()
def iso_c(tensor: Slice, *, scale: float = 1.0) -> Tensor:
    """Sum the task matrices and make the spectrum of the sum flat.

    sum_t Delta_t = U S V^T,  step = scale * mean(S) U V^T

    Args:
        tensor: deltas (T, *s); matrices are (m, n).
        scale: length of the step, unitless, >= 0; chosen on validation data.

    Returns:
        The step, (*s).

    Source: Marczak et al. 2025, arXiv:2502.04959, sec. 4.1 (isotropic merging in common subspace).
    Differs: convolutions too; directions in which no task moved stay at 0.
    """
    check_scale(scale)
    if not is_matrix(tensor):
        return scale * mean_of(tensor)
    summed = summed_matrix(tensor)
    flat = polar(summed)
    # <U V^T, U S V^T> is the sum of the singular values.
    mean = flat.flatten() @ summed.flatten() / min(summed.shape)
    return scale * like(mean * flat, tensor)


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Marczak et al. 2025, arXiv:2502.04959, alg. 2",
    search={"scale": (0.0, 3.0), "common_share": (0.0, 1.0)},
    homogeneous=True,
)
@one_thread()
def iso_cts(tensor: Slice, *, scale: float = 1.0, common_share: float = 0.8) -> Tensor:
    """Make one flat spectrum of a common subspace and of what each task adds to it.

    U_c S_c V_c^T = top-k SVD of sum_t Delta_t;  U_t S_t V_t^T = top-(r - k)/T SVD of
    Delta_t - U_c U_c^T Delta_t;  U = [U_c U_1 ... U_T], V likewise, s = mean of all kept values,
    step = scale * s polar(U) polar(V)^T

    Args:
        tensor: deltas (T, *s); matrices are (m, n), r = min(m, n).
        scale: length of the step, unitless, >= 0; chosen on validation data.
        common_share: k / r, in [0, 1]; k is rounded so that r - k is a multiple of T.

    Returns:
        The step, (*s).

    Source: Marczak et al. 2025, arXiv:2502.04959, alg. 2 (common and task-specific subspaces).
    Differs: convolutions too; directions in which no task moved stay at 0.
    """
    check_scale(scale)
    check_interval("common_share", common_share, "[0, 1]")
    if not is_matrix(tensor):
        return scale * mean_of(tensor)
    summed, count = summed_matrix(tensor), len(tensor.each)
    full = min(summed.shape)
    # At most floor(r / T) directions a task, so that the common ones never number less than 0.
    own = min(round((full - int(common_share * full)) / count), full // count)
    common, _, _ = triplets = leading(summed, full - own * count)
    rest = (delta - common @ (common.mT @ delta) for delta in matrices(tensor))
    parts = [triplets, *(leading(delta, own) for delta in rest)]
    left, values, right = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
    known = has_direction(values)
    step = values.mean() * polar(left * known) @ polar(right * known).mT
    return scale * like(step, tensor)


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Stoica et al. 2024, arXiv:2410.19735 (KnOTS)",
    search={"density": (0.05, 1.0), "scale": (0.0, 3.0)},
    homogeneous=True,
)
@one_thread()
def knots(
    tensor: Slice,
    *,
    rule: Literal["linear", "ties"] = "ties",
    density: float = 0.2,
    scale: float = 1.0,
    combine: Combine = "mean",
) -> Tensor:
    """Write all task matrices in one basis of outputs, and merge what is left of each.

    [Delta_1 ... Delta_T] = U S [V_1^T ... V_T^T],  step = scale * U S merge(V_1, ..., V_T)^T

    Made for experts of low rank (LoRA), whose joint rank is far below min(m, T n).

    Args:
        tensor: deltas (T, *s); matrices are (m, n).
        rule: `linear` combines the V_t as they are, which equals combining the deltas; `ties`
            trims them, elects signs, and combines what agrees.
        density: share of each V_t's entries that `ties` keeps, in (0, 1].
        scale: length of the step, unitless, >= 0.
        combine: the `mean`, of the experts or of those that agree, or the `sum`.

    Returns:
        The step, (*s).

    Source: Stoica et al. 2024, arXiv:2410.19735 (KnOTS-TIES, KnOTS-TA).
    Differs: trims each layer for itself; convolutions too; directions below 1e-6 of the largest
        singular value are left out, as noise of the deltas' rounding.
    """
    check_scale(scale)
    check_interval("density", density, "(0, 1]")
    if not is_matrix(tensor):
        return scale * mean_of(tensor)
    joined = torch.cat(list(matrices(tensor)), dim=1)
    left, values, joint = leading(joined, min(joined.shape))
    # Rows without a direction would count among the entries that are trimmed.
    kept = has_direction(values).bool()
    left, values, joint = left[:, kept], values[kept], joint[:, kept]
    parts = torch.stack(joint.mT.chunk(len(tensor.each), dim=1))  # (T, r, n)
    if rule == "ties":
        thresholds = torch.stack([threshold(part.abs(), density) for part in parts])
        parts = parts * (parts.abs() >= thresholds[:, None, None])
        merged = by_sign(parts, parts.sum(dim=0).sign(), combine)
    else:
        merged = parts.sum(dim=0) if combine == "sum" else parts.mean(dim=0)
    return scale * like((left * values) @ merged, tensor)


def is_matrix(tensor: Slice) -> bool:
    """Return whether a tensor is decomposed: a linear weight or a convolution that is not empty."""
    is_weight = tensor.info.kind in ("linear", "convolution") and tensor.base.ndim >= 2
    return is_weight and tensor.base.numel() > 0


def matrices(tensor: Slice) -> Iterator[Tensor]:
    """Go through the deltas as matrices (m, n) in float64, one expert at a time."""
    return (delta.flatten(1).double() for delta in tensor.each)


def summed_matrix(tensor: Slice) -> Tensor:
    """Return the sum of the deltas as a matrix (m, n) in float64."""
    return sum_of((delta.flatten(1) for delta in tensor.each), dtype=torch.float64)


def mean_of(tensor: Slice) -> Tensor:
    """Return the mean of the deltas, (*s), one expert at a time."""
    return sum_of(iter(tensor.each)) / len(tensor.each)


def like(step: Tensor, tensor: Slice) -> Tensor:
    """Return a matrix in the shape of the tensor and the dtype of its deltas."""
    return step.reshape(tensor.base.shape).to(wide(tensor.base).dtype)
