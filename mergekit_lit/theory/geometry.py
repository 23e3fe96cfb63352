"""This file is the geometry of a merge: how deltas disagree, and what of each its step keeps.

Everything comes from sums over entries, so that tensors are looked at one by one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Columns in float64 at a time: bounds the memory on large tensors.
_CHUNK = 1 << 18


class DeltaSums:
    """Sums over the entries of T deltas, from which norms, angles and conflicts follow.

    For experts s and t: norm_t = ||tau_t||, cosine_st = <tau_s, tau_t> / (||tau_s|| ||tau_t||),
    sign_conflict_st = share of the entries moved by both that they move in opposite directions
    (1/2 for unrelated experts), and
    cancellation = 1 - sum_p |sum_t tau_tp| / sum_p sum_t |tau_tp|, the share of all movement that
    a sum of the deltas loses: 0 if all agree, 1 if nothing remains.
    """

    def __init__(self, experts: int) -> None:
        self.products = torch.zeros(experts, experts, dtype=torch.float64)  # <tau_s, tau_t>
        self._signs = torch.zeros(experts, experts, dtype=torch.float64)  # agreeing - opposite
        self._both = torch.zeros(experts, experts, dtype=torch.float64)  # entries moved by both
        self._moved = 0.0  # sum_p sum_t |tau_tp|
        self._kept = 0.0  # sum_p |sum_t tau_tp|

    def add(self, deltas: Tensor) -> None:
        """Add one tensor's deltas, (T, *s)."""
        for part in _parts(deltas):
            signs = part.sign()
            self.products += (part @ part.T).cpu()
            self._signs += (signs @ signs.T).cpu()
            self._both += (signs.abs() @ signs.abs().T).cpu()
            self._moved += float(part.abs().sum())
            self._kept += float(part.sum(dim=0).abs().sum())

    @property
    def norms(self) -> Tensor:
        """||tau_t||, (T,)."""
        return self.products.diagonal().sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosines of the pairs, (T, T); NaN with a delta of 0."""
        return (self.products / torch.outer(self.norms, self.norms)).clamp(-1, 1)

    @property
    def sign_conflict(self) -> Tensor:
        """Sign conflicts of the pairs, (T, T); NaN where no entry is moved by both."""
        return (self._both - self._signs) / (2 * self._both)

    @property
    def cancellation(self) -> float:
        """Share of all movement that the sum loses, in [0, 1]; NaN where nothing moved."""
        return 1 - self._kept / self._moved if self._moved else math.nan

    @classmethod
    def total(cls, parts: Iterable["DeltaSums"], experts: int) -> "DeltaSums":
        """Return the sums over all parts together."""
        total = cls(experts)
        for part in parts:
            total.products += part.products
            total._signs += part._signs
            total._both += part._both
            total._moved += part._moved
            total._kept += part._kept
        return total


class StepSums:
    """Sums over the entries of T deltas and the step of their merge.

    survival_t = <step, tau_t> / ||tau_t||^2, what of a task's delta the step keeps, 1 for all of
    it; interference_t = ||step - survival_t tau_t|| / ||tau_t||, what else it carries.
    """

    def __init__(self, experts: int) -> None:
        self._along = torch.zeros(experts, dtype=torch.float64)  # <step, tau_t>
        self._squares = torch.zeros(experts, dtype=torch.float64)  # ||tau_t||^2
        self._square = 0.0  # ||step||^2

    def add(self, deltas: Tensor, step: Tensor) -> None:
        """Add one tensor's deltas, (T, *s), and step, (*s)."""
        for part, along in zip(_parts(deltas), _parts(step[None]), strict=True):
            self._along += (part @ along[0]).cpu()
            self._squares += part.square().sum(1).cpu()
            self._square += float(along.square().sum())

    @property
    def length(self) -> float:
        """||step||."""
        return math.sqrt(self._square)

    @property
    def norms(self) -> Tensor:
        """||tau_t||, (T,)."""
        return self._squares.sqrt()

    @property
    def survival(self) -> Tensor:
        """What of each delta the step keeps, (T,); NaN of a delta of 0."""
        return self._along / self._squares

    @property
    def interference(self) -> Tensor:
        """What else the step carries, in lengths of each delta, (T,); NaN of a delta of 0."""
        # Rounding may leave less than nothing of a step along one delta alone.
        apart = (self._square - self._along.square() / self._squares).clamp(min=0)
        return (apart / self._squares).sqrt()

    @classmethod
    def total(cls, parts: Iterable["StepSums"], experts: int) -> "StepSums":
        """Return the sums over all parts together."""
        total = cls(experts)
        for part in parts:
            total._along += part._along
            total._squares += part._squares
            total._square += part._square
        return total


Tensors: TypeAlias = Iterable[tuple[str, Tensor]]
"""Names, and the T deltas of each, (T, *s)."""


def delta_sums(tensors: Tensors, groups: Mapping[str, str]) -> dict[str, DeltaSums]:
    """Return the sums of each layer group, by name.

    Args:
        tensors: name and deltas of each tensor.
        groups: the group that each name is of.
    """
    found: dict[str, DeltaSums] = {}
    for name, deltas in tensors:
        found.setdefault(groups[name], DeltaSums(len(deltas))).add(deltas)
    return dict(sorted(found.items()))


def step_sums(
    tensors: Tensors, steps: Mapping[str, Tensor], groups: Mapping[str, str]
) -> dict[str, StepSums]:
    """Return the sums of each layer group with the step of a merge, by name.

    Args:
        tensors: name and deltas of each tensor.
        steps: the merge's step from the base, by name.
        groups: the group that each name is of.
    """
    found: dict[str, StepSums] = {}
    for name, deltas in tensors:
        found.setdefault(groups[name], StepSums(len(deltas))).add(deltas, steps[name])
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Subspace:
    """The directions of outputs in which one task matrix moved most.

    Attributes:
        basis: orthonormal columns, (m, k).
        share: of ||tau||_F^2 that lies in them, in (0, 1]; NaN of a delta of 0.
    """

    basis: Tensor
    share: float


def leading_subspace(delta: Tensor, *, rank: int = 8) -> Subspace:
    """Return the span of the leading left singular vectors of one delta, and its share.

    Args:
        delta: (m, *s), a matrix (m, n) once flattened but for its first axis.
        rank: k, at most; min(m, n) where that is less.
    """
    matrix = delta.double().flatten(1)
    rank = min(rank, *matrix.shape)
    tall = matrix.shape[0] > matrix.shape[1]
    # Of the smaller of tau tau^T and tau^T tau: far cheaper than all singular vectors.
    values, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    leading = vectors[:, -rank:]
    basis = torch.linalg.qr(matrix @ leading).Q if tall else leading
    total = float(values.clamp(min=0).sum())
    share = float(values[-rank:].sum()) / total if total else math.nan
    return Subspace(basis, min(1.0, share) if total else share)


def subspace_overlap(left: Subspace, right: Subspace) -> float:
    """Return ||U_s^T U_t||_F^2 / k: 1 for the same subspace, k / m for unrelated ones."""
    smaller = min(left.basis.shape[1], right.basis.shape[1])
    return float((left.basis.T @ right.basis).square().sum()) / smaller


def pairs_of(matrix: Tensor, expert: int) -> list[float]:
    """Return one expert's entries with all others, those that are numbers."""
    row = matrix[expert].tolist()
    return [value for t, value in enumerate(row) if t != expert and not math.isnan(value)]


def mean_over_pairs(matrix: Tensor) -> float | None:
    """Return the mean above the diagonal, over the pairs where it is defined."""
    above = torch.ones_like(matrix).triu(1).bool() & ~matrix.isnan()
    return float(matrix[above].mean()) if bool(above.any()) else None


def _parts(tensors: Tensor) -> Sequence[Tensor]:
    """Return rows (T, n) of float64, in parts of columns."""
    flat = tensors.detach().reshape(len(tensors), tensors[0].numel())
    return [part.double() for part in torch.split(flat, _CHUNK, dim=1)]
