"""This file is what a merge's coefficients weigh: effective travel, shares, and divergences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Block:
    """Parameters that one row of coefficients moves, where these differ by layer.

    Attributes:
        name: such as the layer group's.
        coefficients: lambda_i^l of T experts.
        moved: m_i^l = ||tau_i^l||^2 / ||tau_i||^2, the part of each expert's displacement that lies
            here; over the blocks it sums to 1.
        tensors: names of the parameters.
    """

    name: str
    coefficients: Sequence[float]
    moved: Sequence[float]
    tensors: Sequence[str] = ()


@dataclass(frozen=True)
class Weighing:
    """What T coefficients make of T experts that travelled differently far.

    Attributes:
        p: weight of each task in the target, sum 1.
        coefficients: lambda_i; where they differ by block their mean, sum_l m_i^l lambda_i^l.
        squares: lambda_i^2, or sum_l m_i^l (lambda_i^l)^2.
        a_eff: sum_i lambda_i eta_i ||a_i||_1, the merge's own travel; None if a travel is unknown.
        w: lambda_i eta_i ||a_i||_1 / a_eff, the objective that the merge descends; None if unknown
            or if the travels cancel. Where all coefficients are 0 nothing is descended: then p.
        chi2_lambda: sum_i (p_i - q_i)^2 / q_i with q = lambda / sum lambda; 0 for equal
            coefficients and tasks. None where a coefficient is not positive.
        chi2_w: the same with q = w. None where it is unknown or a coefficient is not positive.
        tv_lambda: (1/2) sum_i |p_i - q_i| with q = lambda / sum lambda; None if they sum to 0.
        tv_w: the same with q = w.
        moved: parts m_i of the experts' displacements that these coefficients move: all but for
            those of a block.
        blocks: by block the same for its own coefficients; empty where they do not differ.
    """

    p: tuple[float, ...]
    coefficients: tuple[float, ...]
    squares: tuple[float, ...]
    a_eff: float | None
    w: tuple[float, ...] | None
    chi2_lambda: float | None
    chi2_w: float | None
    tv_lambda: float | None
    tv_w: float | None
    moved: tuple[float, ...]
    blocks: Mapping[str, "Weighing"] = field(default_factory=dict)

    @property
    def largest(self) -> tuple[float, ...]:
        """The lambda_i^l of each expert that is farthest from 0, over the blocks."""
        rows = [block.coefficients for block in self.blocks.values()] or [self.coefficients]
        return tuple(max(each, key=abs) for each in zip(*rows, strict=True))

    @property
    def negative(self) -> bool:
        """Whether a coefficient is below 0, in any block."""
        rows = [block.coefficients for block in (self.blocks.values() or [self])]
        return min(map(min, rows)) < 0

    @property
    def farthest(self) -> float | None:
        """A_eff of the block that travels farthest."""
        each = [block.a_eff for block in (self, *self.blocks.values())]
        known = [a_eff for a_eff in each if a_eff is not None]
        return max(known, default=None)


def weigh(
    coefficients: Sequence[float],
    travels: Sequence[float | None],
    *,
    p: Sequence[float] | None = None,
) -> Weighing:
    """Return effective travel, shares and both coefficient divergences of a merge, in closed form.

    Args:
        coefficients: lambda_i of T experts.
        travels: eta_i ||a_i||_1 of each, as its card tells; None where unknown.
        p: weights of the tasks, each positive, sum 1; None for 1/T each.

    Raises:
        ValueError: different lengths, no expert, a coefficient that is not finite, a travel that is
            not positive, or weights that are none.

    Source: chi2_lambda: arXiv 2601.21690 (the source's reading: simple averaging sets it to 0);
    chi2_w: our reconstruction, after Wang et al. 2020, arXiv:2007.07481, theorem 2 (FedNova).
    """
    count = len(coefficients)
    target = tuple(p) if p is not None else (1.0 / count,) * count if count else ()
    _check(coefficients, travels, target)
    q = _normalised(coefficients)
    known = [travel for travel in travels if travel is not None]
    moved = None
    if len(known) == count:
        moved = [lam * travel for lam, travel in zip(coefficients, known, strict=True)]
    a_eff = None if moved is None else math.fsum(moved)
    w = None if moved is None else _normalised(moved)
    if not any(coefficients):
        a_eff, w = 0.0, target
    return Weighing(
        p=target,
        coefficients=tuple(coefficients),
        squares=tuple(lam**2 for lam in coefficients),
        a_eff=a_eff,
        w=w,
        chi2_lambda=chi_square(target, q),
        chi2_w=chi_square(target, w),
        tv_lambda=total_variation(target, q),
        tv_w=total_variation(target, w),
        moved=(1.0,) * count,
    )


def weigh_blocks(
    blocks: Sequence[Block],
    travels: Sequence[float | None],
    *,
    p: Sequence[float] | None = None,
) -> Weighing:
    """Return the weighing of a merge whose coefficients differ by block of parameters.

    A_eff, w and the divergences are those of the mean coefficients, with each block's own beside
    them. Blocks of equal coefficients give what `weigh` gives, however the parameters are cut.

    Args:
        blocks: whose parameters are all that the merge moves.
        travels: as of `weigh`.
        p: as of `weigh`.

    Raises:
        ValueError: as `weigh`; or parts of a displacement that do not sum to 1.

    Source: our reconstruction.
    """
    parts = [math.fsum(each) for each in zip(*(block.moved for block in blocks), strict=True)]
    if not parts or any(not math.isclose(part, 1.0, rel_tol=1e-6) for part in parts):
        raise ValueError(
            f"The blocks' parts of each expert's displacement must sum to 1, but sum to {parts!r}."
        )

    def mean(power: int) -> tuple[float, ...]:
        rows = [
            [m * lam**power for m, lam in zip(block.moved, block.coefficients, strict=True)]
            for block in blocks
        ]
        return tuple(math.fsum(each) for each in zip(*rows, strict=True))

    whole = weigh(mean(1), travels, p=p)
    if not any(mean(1)) and any(mean(2)):
        # Means that cancel are no merge that stays at the base.
        whole = replace(whole, w=None, chi2_w=None, tv_w=None)
    return replace(
        whole,
        squares=mean(2),
        blocks={
            block.name: replace(weigh(block.coefficients, travels, p=p), moved=tuple(block.moved))
            for block in blocks
        },
    )


def chi_square(p: Sequence[float], q: Sequence[float] | None) -> float | None:
    """Return sum_i (p_i - q_i)^2 / q_i; None where q is unknown or not positive."""
    if q is None or min(q) <= 0:
        return None
    return math.fsum((a - b) ** 2 / b for a, b in zip(p, q, strict=True))


def total_variation(p: Sequence[float], q: Sequence[float] | None) -> float | None:
    """Return (1/2) sum_i |p_i - q_i|; None where q is unknown."""
    if q is None:
        return None
    return 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def _normalised(values: Sequence[float]) -> tuple[float, ...] | None:
    total = math.fsum(values)
    return None if total == 0 else tuple(value / total for value in values)


def _check(
    coefficients: Sequence[float], travels: Sequence[float | None], p: Sequence[float]
) -> None:
    if not coefficients:
        raise ValueError("A merge must have at least one coefficient, but got none.")
    for name, values in (("travels", travels), ("p", p)):
        if len(values) != len(coefficients):
            raise ValueError(
                f"`{name}` must hold one number for each of the {len(coefficients)} coefficients, "
                f"but holds {len(values)}."
            )
    bad = next((i for i, value in enumerate(coefficients) if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(f"Coefficient {bad} must be finite, but is {coefficients[bad]!r}.")
    still = [s for s in travels if s is not None and not 0 < s < math.inf]
    if still:
        raise ValueError(f"A travel must be positive and finite, but one is {still[0]!r}.")
    if min(p) <= 0 or not math.isclose(math.fsum(p), 1.0, rel_tol=1e-9):
        raise ValueError(f"`p` must be positive and sum to 1, but is {list(p)!r}.")
