"""This file is averages that keep lengths: along great circles instead of straight lines.

Each tensor is one vector x_t. Every method here returns a combination sum_t c_t x_t, whose
coefficients follow from the inner products <x_s, x_t> alone; these are summed in float64.
"""

from typing import Literal

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import check_interval
from mergekit_lit.merging.methods.directions import lengths_and_cosines, mean_direction
from mergekit_lit.merging.reductions import total
from mergekit_lit.merging.steps import shares_of, sum_of, weighted_sum

Along = Literal["tensor", "rows", "columns"]
"""What is one vector of a matrix."""

Space = Literal["weights", "deltas"]
"""What the vectors are: the experts' own tensors theta_t, or their deltas tau_t."""

# Vectors this close to one line are joined by a straight line.
_ON_ONE_LINE = 0.9995

_TWO = (2, 2)


@MERGE_METHODS.add(
    form="kernel",
    family="averaging",
    data="none",
    source="Shoemake 1985, doi:10.1145/325165.325242",
    search={"position": (0.0, 1.0)},
    experts=_TWO,
    order="`position` is counted from the first expert to the second",
)
def slerp(tensor: Slice, *, position: float = 0.5) -> Tensor:
    """Go along the great circle from one expert to another.

    w = angle(theta_1, theta_2),
    theta = sin((1 - p) w) / sin(w) theta_1 + sin(p w) / sin(w) theta_2;
    straight, (1 - p) theta_1 + p theta_2, if |cos w| > 0.9995

    Args:
        tensor: deltas (2, *s); each tensor is one vector.
        position: p, share of the way from the first expert to the second, in [0, 1].

    Returns:
        The step, (*s).

    Source: Shoemake 1985, doi:10.1145/325165.325242.
    Differs: the ends need not be of one length; each tensor is taken for itself.
    """
    check_interval("position", position, "[0, 1]")
    return _between(tensor, position, along="tensor", space="weights")


@MERGE_METHODS.add(
    form="kernel",
    family="averaging",
    data="none",
    source="Goddard et al. 2024, arXiv:2403.13257 (NuSLERP of mergekit 0.1)",
    experts=_TWO,
)
def nuslerp(
    tensor: Slice,
    *,
    weights: list[float] | None = None,
    along: Along = "tensor",
    space: Space = "weights",
) -> Tensor:
    """Go along great circles between two experts, of whole tensors, rows or columns.

    p = w_2 / (w_1 + w_2),  x = slerp(x_1, x_2, p)

    Args:
        tensor: deltas (2, *s); matrices are (m, n).
        weights: w, two numbers >= 0 of any sum > 0, in the order of the experts. Null weighs both
            alike.
        along: what is one vector: the whole `tensor`, each of the m `rows` or each of the n
            `columns` of a matrix; tensors of fewer than 2 axes are always whole.
        space: turn the experts' own `weights`, or their `deltas` from the base.

    Returns:
        The step, (*s).

    Source: Goddard et al. 2024, arXiv:2403.13257 (NuSLERP of mergekit 0.1).
    Differs: convolutions are matrices (C_out, C_in * kh * kw).
    """
    return _between(tensor, float(shares_of(weights, 2)[1]), along=along, space=space)


@MERGE_METHODS.add(
    form="kernel",
    family="averaging",
    data="none",
    source="Goddard et al. 2024, arXiv:2403.13257 (Multi-SLERP of mergekit 0.1)",
)
def multislerp(
    tensor: Slice, *, weights: list[float] | None = None, space: Space = "weights"
) -> Tensor:
    """Average directions and lengths apart.

    u_t = x_t / |x_t|,  m = normalise(sum_t p_t u_t),  x = m sum_t p_t |x_t|

    Args:
        tensor: deltas (T, *s); each tensor is one vector.
        weights: p, one number >= 0 per expert in the order of the experts, of any sum > 0: they
            are divided by it. Null weighs all experts alike.
        space: average the experts' own `weights`, or their `deltas` from the base.

    Returns:
        The step, (*s).

    Source: Goddard et al. 2024, arXiv:2403.13257 (Multi-SLERP of mergekit 0.1).
    Differs: there m moves on by v = sum_t p_t (u_t - <u_t, m> m), which is 0 for every input, since
        sum_t p_t u_t is a multiple of m; `karcher` has the step that does move. Where the
        directions cancel, the mean takes over.
    """
    return _combined(tensor, shares_of(weights, len(tensor.deltas)), iterations=0, space=space)


@MERGE_METHODS.add(
    form="kernel",
    family="averaging",
    data="none",
    source="Karcher 1977, doi:10.1002/cpa.3160300502",
)
def karcher(
    tensor: Slice,
    *,
    weights: list[float] | None = None,
    iterations: int = 10,
    space: Space = "weights",
) -> Tensor:
    """Average directions by the mean of the sphere, and lengths apart.

    u_t = x_t / |x_t|,  m <- exp_m(sum_t p_t log_m(u_t)) until the step is below 1e-5,
    x = m sum_t p_t |x_t|;
    log_m(u) = a (u - cos(a) m) / sin(a),  a = angle(m, u),  exp_m(v) = cos|v| m + sin|v| v / |v|

    Args:
        tensor: deltas (T, *s); each tensor is one vector.
        weights: p, one number >= 0 per expert in the order of the experts, of any sum > 0: they
            are divided by it. Null weighs all experts alike.
        iterations: most steps taken from m = normalise(sum_t p_t u_t), >= 0.
        space: average the experts' own `weights`, or their `deltas` from the base.

    Returns:
        The step, (*s).

    Source: Karcher 1977, doi:10.1002/cpa.3160300502 (the Riemannian centre of mass).
    Differs: where the directions cancel, the mean takes over; a vector opposite to m has no
        direction to it and is left out of the step.
    """
    if iterations < 0:
        raise ValueError(f"`iterations` must be at least 0, but is {iterations!r}.")
    shares = shares_of(weights, len(tensor.deltas))
    return _combined(tensor, shares, iterations=iterations, space=space)


@MERGE_METHODS.add(
    form="kernel",
    family="averaging",
    data="none",
    source="Jang et al. 2024, arXiv:2403.19522 (Model Stock)",
)
def model_stock(tensor: Slice) -> Tensor:
    """Average the experts, and go back towards the base as far as their angles tell.

    c = mean_{s < t} cos(tau_s, tau_t),  r = T c / (1 + (T - 1) c),  step = r mean_t tau_t

    Made for experts of one task: experts of many tasks are nearly orthogonal, and the base is
    hardly left.

    Args:
        tensor: deltas (T, *s); each tensor is one vector.

    Returns:
        The step, (*s).

    Source: Jang et al. 2024, arXiv:2403.19522.
    Differs: r is 0 where the experts are opposed (c < 0), which the paper does not treat; r is 1
        for one expert.
    """
    count, c = len(tensor.each), _mean_cosine(tensor)
    ratio = max(0.0, count * c / (1 + (count - 1) * c)) if c > 0 else 0.0
    return ratio * sum_of(iter(tensor.each)) / count


def _mean_cosine(tensor: Slice) -> float:
    """Return mean_{s < t} cos(tau_s, tau_t), one expert at a time; 1 for one expert.

    sum_{s < t} <u_s, u_t> = (||sum_t u_t||^2 - sum_t ||u_t||^2) / 2 of the directions u_t, which
    are 0 where an expert did not move.
    """
    pairs = len(tensor.each) * (len(tensor.each) - 1) / 2
    summed, moved = torch.zeros(tensor.base.numel(), dtype=torch.float64), 0
    for delta in tensor.each:
        row = delta.flatten().double()
        length = float(total(row.square())) ** 0.5
        if length > 0:
            summed += row / length
            moved += 1
    return (float(total(summed.square())) - moved) / 2 / pairs if pairs else 1.0


def _between(tensor: Slice, position: float, *, along: Along, space: Space) -> Tensor:
    """Return the step to the point at a share of the arc between two experts, (*s)."""
    points = _points(tensor, space)
    whole = along == "tensor" or tensor.base.ndim < 2
    matrices = _rows(points)[:, :, None] if whole else points.flatten(2)
    cosine = _cosine(matrices[0].double(), matrices[1].double(), "tensor" if whole else along)
    straight = cosine.abs() > _ON_ONE_LINE
    angle = cosine.clamp(-1, 1).acos()
    sine = torch.where(straight, 1, angle.sin())
    coefficients = torch.stack(
        [
            torch.where(straight, share, (share * angle).sin() / sine)
            for share in (1 - position, position)
        ]
    )
    # The base enters only where the coefficients do not sum to 1: on straight lines, never.
    excess = torch.where(straight, 0, coefficients.sum(dim=0) - 1)
    step = weighted_sum(coefficients, tensor.deltas.reshape(matrices.shape))
    if space == "weights":
        step = step + excess.to(step.dtype) * tensor.base.to(step.dtype).reshape(step.shape)
    return step.reshape(tensor.base.shape)


def _cosine(left: Tensor, right: Tensor, along: Along) -> Tensor:
    """Return the cosine of two matrices, of their rows (m, 1) or columns (1, n); 1 with a zero."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        if along == "tensor":
            return total(a * b)
        return (a * b).sum(dim=1 if along == "rows" else 0, keepdim=True)

    length = (inner(left, left) * inner(right, right)).sqrt()
    return torch.where(length > 0, inner(left, right) / torch.where(length > 0, length, 1), 1)


def _combined(tensor: Slice, shares: Tensor, *, iterations: int, space: Space) -> Tensor:
    """Return the step to the mean direction times the mean length, (*s)."""
    if not bool((tensor.deltas != tensor.deltas[0]).any()):
        return tensor.deltas[0].clone()  # where all agree, rounding must not move it
    lengths, cosines = lengths_and_cosines(_rows(_points(tensor, space)))
    direction = mean_direction(cosines, shares, iterations)
    if direction is None:
        return weighted_sum(shares, tensor.deltas)
    length = (shares * lengths).sum()
    coefficients = torch.where(lengths > 0, length * direction / lengths, 0)
    step = weighted_sum(coefficients, tensor.deltas)
    if space == "weights":
        step = step + (coefficients.sum() - 1).to(step.dtype) * tensor.base.to(step.dtype)
    return step


def _points(tensor: Slice, space: Space) -> Tensor:
    """Return the vectors, (T, *s): the deltas, or the tensors that they lead to."""
    return tensor.deltas if space == "deltas" else tensor.base.to(tensor.deltas) + tensor.deltas


def _rows(tensors: Tensor) -> Tensor:
    return tensors.reshape(len(tensors), tensors[0].numel())
