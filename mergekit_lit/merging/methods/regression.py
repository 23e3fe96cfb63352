"""This file is merging as least squares: layers that answer a task's inputs as its expert did."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_interval
from mergekit_lit.merging.methods.moments import (
    as_matrices,
    check_samples,
    input_moments,
    looks,
    matrix_names,
)
from mergekit_lit.merging.passes import mean_delta
from mergekit_lit.merging.steps import moved


def _check(_: Experts, *, off_diagonal: float, samples: int, ridge: float) -> None:
    check_interval("off_diagonal", off_diagonal, "[0, 1]")
    check_samples(samples)
    if ridge <= 0:
        raise ValueError(f"`ridge` must be above 0, but is {ridge!r}.")


@MERGE_METHODS.add(
    form="whole",
    family="moments",
    data="train",
    source="Jin et al. 2023, arXiv:2212.09849, sec. 3 (RegMean)",
    search={"off_diagonal": (0.0, 1.0)},
    check=_check,
)
def regmean(
    experts: Experts,
    calibration: Calibration,
    *,
    off_diagonal: float = 0.9,
    samples: int = 256,
    ridge: float = 1e-6,
    seed: int = 0,
) -> Merged:
    """Find the layers that are closest to each expert's on that expert's own inputs.

    min_W sum_t E||W x_t - W_t x_t||^2:  W = (sum_t W_t G_t) (sum_t G_t)^-1,  G_t = E[x_t x_t^T],
    its entries off the diagonal shrunk by a

    Linear weights are (m, n), convolutions (C_out, C_in * kh * kw) with the patches that they see
    as rows x_t; all other tensors are averaged. Queries, keys and values in one weight (3 d, d)
    read the same x_t, so that they are found together as each would be alone. The inputs x_t are
    those in expert t, under its own BatchNorm statistics.

    Args:
        experts: T experts of one base.
        calibration: training images of each task; labels are not looked at.
        off_diagonal: a, share of the entries of G_t off its diagonal that is kept, in [0, 1]; 0
            weighs each input by its own size, 1 is the plain regression.
        samples: largest number of images of each task, >= 1.
        ridge: pull towards the average where no input tells, in units of the mean diagonal entry
            of sum_t G_t, > 0.
        seed: of the choice of images.

    Source: Jin et al. 2023, arXiv:2212.09849, sec. 3 (RegMean).
    Differs: convolutions too; `ridge`, without which inputs that are always 0 have no solution.
    """
    _check(experts, off_diagonal=off_diagonal, samples=samples, ridge=ridge)
    equations = NormalEquations(experts, off_diagonal=off_diagonal, ridge=ridge)
    names = matrix_names(experts)
    for t, task in enumerate(experts.names):
        params = dict(experts.tuned[t])
        batches = looks(calibration, t, task, samples, seed)
        equations.add(t, input_moments(calibration.expert, params, batches, names))
    return _completed(experts, equations.solved())


@MERGE_METHODS.add(
    form="whole",
    family="moments",
    data="train",
    source="Nguyen et al. 2025, arXiv:2508.03121 (RegMean++)",
    search={"off_diagonal": (0.0, 1.0)},
    check=_check,
)
def regmean_plus_plus(
    experts: Experts,
    calibration: Calibration,
    *,
    off_diagonal: float = 0.9,
    samples: int = 256,
    ridge: float = 1e-6,
    seed: int = 0,
) -> Merged:
    """Do as RegMean, block by block, on the inputs that the merged blocks below hand up.

    W = (sum_t W_t G_t) (sum_t G_t)^-1 in the blocks' order, G_t = E[x_t x_t^T] of the inputs of
    expert t's block on top of the merged blocks below it

    Where BatchNorm is to be recalibrated, the pass is normalised by each task's own batch;
    otherwise merged blocks have the statistics of the policy, and expert t's block its own.

    Args:
        experts: T experts of one base.
        calibration: training images of each task; labels are not looked at.
        off_diagonal: a, share of the entries of G_t off its diagonal that is kept, in [0, 1].
        samples: largest number of images of each task, >= 1; each is passed once per block.
        ridge: pull towards the average where no input tells, in units of the mean diagonal entry
            of sum_t G_t, > 0.
        seed: of the choice of images.

    Source: Nguyen et al. 2025, arXiv:2508.03121 (RegMean++).
    Differs: convolutions too; `ridge`, as in `regmean`.
    """
    _check(experts, off_diagonal=off_diagonal, samples=samples, ridge=ridge)
    steps: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    for names in _blocks(experts):
        equations = NormalEquations(experts, off_diagonal=off_diagonal, ridge=ridge)
        weights = sorted(set(names) & set(matrix_names(experts)))
        for t, task in enumerate(experts.names if weights else ()):
            hybrid = {**experts.tuned[t], **below}
            batches = looks(calibration, t, task, samples, seed)
            equations.add(t, input_moments(calibration.merged, hybrid, batches, weights))
        steps |= equations.solved()
        merged = _merged_tensors(experts, steps, names)
        below |= {name: calibration.statistics.get(name, merged[name]) for name in names}
    return _completed(experts, steps)


def _completed(experts: Experts, solved: Mapping[str, Tensor]) -> Merged:
    """Return the merge whose other tensors are averaged."""
    shared = _merged_tensors(experts, solved, list(experts.base))
    facts = {"solved_layers": len(solved)}
    return Merged(shared=shared, structure=experts.structure, facts=facts)


def _merged_tensors(
    experts: Experts, solved: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return some tensors of the merge: solved, or averaged, or the base's."""
    steps = (
        (name, solved[name] if name in solved else mean_delta(experts, name))
        for name in sorted(set(names) & set(experts.merged_names()))
    )
    return moved({name: experts.base[name] for name in names}, steps)


def _blocks(experts: Experts) -> list[list[str]]:
    """Return the names of the tensors of each block, statistics included, from the input up."""
    blocks: dict[int, list[str]] = {}
    for name in experts.base:
        blocks.setdefault(experts.structure[name].depth, []).append(name)
    return [blocks[depth] for depth in sorted(blocks)]


class NormalEquations:
    """Sums of the normal equations over experts; memory does not grow with their number.

    With D_t = tau_t - mean tau, the step is mean tau + (sum_t D_t G_t) (sum_t G_t)^-1.
    """

    def __init__(self, experts: Experts, *, off_diagonal: float, ridge: float) -> None:
        self._experts = experts
        self._off_diagonal = off_diagonal
        self._ridge = ridge
        self._means: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}

    def add(self, t: int, moments: Mapping[str, Tensor]) -> None:
        """Add the moments G_t of expert t, (g, n, n) by name."""
        for name, gram in moments.items():
            shrunk = _shrunk(gram, self._off_diagonal)
            if name not in self._means:
                mean = as_matrices(mean_delta(self._experts, name), len(gram))
                self._means[name] = mean
                self._products[name] = torch.zeros_like(shrunk)
                self._targets[name] = torch.zeros_like(mean)
            base, tuned = self._experts.base[name], self._experts.tuned[t][name]
            delta = as_matrices(tuned.double() - base.double(), len(gram))
            self._targets[name] += (delta - self._means[name]) @ shrunk
            self._products[name] += shrunk

    def solved(self) -> dict[str, Tensor]:
        """Return the step of each layer that was added, in its own shape."""
        return {
            name: (mean + solve(self._products[name], self._targets[name], ridge=self._ridge))
            .flatten(0, 1)
            .reshape(self._experts.base[name].shape)
            for name, mean in self._means.items()
        }


def solve(products: Tensor, targets: Tensor, *, ridge: float) -> Tensor:
    """Return X with X (A + r I) = B, r being `ridge` times the mean diagonal entry of A.

    Args:
        products: A, symmetric and positive semidefinite, (g, n, n).
        targets: B, (g, m, n).
        ridge: > 0.
    """
    size = products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    damping = ridge * torch.where(size > 0, size, 1)
    damped = products + damping * torch.eye(products.shape[-1], dtype=products.dtype)
    return torch.cholesky_solve(targets.mT, torch.linalg.cholesky(damped)).mT


def _shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    """Return a G + (1 - a) diag(G), (g, n, n)."""
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    return off_diagonal * gram + (1 - off_diagonal) * diagonal
