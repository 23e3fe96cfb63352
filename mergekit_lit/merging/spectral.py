"""This file is the methods that act on singular vectors: TSV-M, Iso-C, Iso-CTS.

Linear weights and convolutions, the latter reshaped to (C_out, C_in * kh * kw), are decomposed in
float64; every other tensor takes the mean of the deltas, as the papers do.
"""

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_scale

# Singular values below this share of the largest are rounding noise of float32 deltas, not
# directions: they are left out instead of being blown up to the size of the others.
_RELATIVE_RANK_TOLERANCE = 1e-6


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Gargiulo et al. 2025, arXiv:2412.00081, alg. 1",
    search={"scale": (0.0, 3.0)},
)
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
    matrices = _matrices(tensor)
    if matrices is None:
        return scale * tensor.deltas.mean(dim=0)
    rank = max(1, min(matrices.shape[1:]) // len(matrices))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = values[:, :rank].flatten()  # (kT,)
    columns = torch.cat(list(left[:, :, :rank]), dim=1) * _has_direction(kept)  # (m, kT)
    rows = torch.cat(list(right[:, :rank].mT), dim=1) * _has_direction(kept)  # (n, kT)
    step = (_polar(columns) * kept) @ _polar(rows).mT
    return scale * _like(step, tensor)


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Marczak et al. 2025, arXiv:2502.04959, sec. 4.1",
    search={"scale": (0.0, 3.0)},
)
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
    matrices = _matrices(tensor)
    if matrices is None:
        return scale * tensor.deltas.mean(dim=0)
    total = matrices.sum(dim=0)
    flat = torch.linalg.svdvals(total).mean()
    return scale * _like(flat * _polar(total), tensor)


@MERGE_METHODS.add(
    form="kernel",
    family="spectral",
    data="none",
    source="Marczak et al. 2025, arXiv:2502.04959, alg. 2",
    search={"scale": (0.0, 3.0), "common_share": (0.0, 1.0)},
)
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
    if not 0 <= common_share <= 1:
        raise ValueError(f"`common_share` must lie in [0, 1], but is {common_share!r}.")
    matrices = _matrices(tensor)
    if matrices is None:
        return scale * tensor.deltas.mean(dim=0)
    full = min(matrices.shape[1:])
    # At most floor(r / T) directions a task, so that the common ones never number less than 0.
    own = min(round((1 - common_share) * full / len(matrices)), full // len(matrices))
    common = full - own * len(matrices)
    left, values, right = torch.linalg.svd(matrices.sum(dim=0), full_matrices=False)
    left_common = left[:, :common]
    rest = matrices - left_common @ (left_common.mT @ matrices)
    own_left, own_values, own_right = torch.linalg.svd(rest, full_matrices=False)
    columns = torch.cat([left_common, *own_left[:, :, :own]], dim=1)  # (m, r)
    rows = torch.cat([right[:common].mT, *own_right[:, :own].mT], dim=1)  # (n, r)
    kept = torch.cat([values[:common], own_values[:, :own].flatten()])
    moved = _has_direction(kept)
    step = kept.mean() * _polar(columns * moved) @ _polar(rows * moved).mT
    return scale * _like(step, tensor)


def _matrices(tensor: Slice) -> Tensor | None:
    """Return the deltas as matrices (T, m, n) in float64, or None where the mean is taken."""
    is_weight = tensor.info.kind in ("linear", "convolution") and tensor.base.ndim >= 2
    if not is_weight or tensor.base.numel() == 0:
        return None
    return tensor.deltas.flatten(2).double()


def _polar(matrix: Tensor) -> Tensor:
    """Return U V^T of A = U S V^T, without the directions that A does not have; (m, n)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = (left * _has_direction(values)) @ right
    return polar


def _has_direction(values: Tensor) -> Tensor:
    """Return 1 where a singular value stands out of the rounding noise, else 0, like `values`.

    The singular vectors of the others are arbitrary: they must not enter an orthogonalisation.
    """
    return (values > _RELATIVE_RANK_TOLERANCE * values.max()).to(values.dtype)


def _like(step: Tensor, tensor: Slice) -> Tensor:
    return step.reshape(tensor.base.shape).to(tensor.deltas.dtype)
