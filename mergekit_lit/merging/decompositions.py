"""This file is singular values and vectors by way of the smaller Gram matrix, in float64.

An eigendecomposition of A^T A (or A A^T) takes a fraction of the time of an SVD of A, and nothing
of the size of the larger side beyond what is asked for. Squaring costs half of the digits: values
below about 1e-7 of the largest are noise, which the callers' threshold of 1e-6 leaves out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding noise of float32 deltas, not
# directions: they are left out instead of being blown up to the size of the others.
RELATIVE_RANK_TOLERANCE = 1e-6

# Columns of a Gram matrix that are made at once.
_COLUMNS = 192


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside, and with as many as before after it; also a decorator.

    A matrix product or a decomposition that several threads share differs in its last bits by their
    number, and dividing by small singular values carries that up to the digits of float32.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of A = U S V^T, largest first.

    Vectors of directions that A does not have are 0.

    Args:
        matrix: A, (m, n), float64.
        count: k, number of triplets, at most min(m, n).

    Returns:
        U (m, k), the values (k,), and V (n, k).
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = leading(matrix.mT, count)
        return left, values, right
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    values = squares.clamp(min=0).sqrt().flip(0)
    right = vectors.flip(1)[:, :count] * has_direction(values)[:count]
    kept = values[:count]
    left = matrix @ right / torch.where(kept > 0, kept, 1)
    return left, kept, right


def polar(matrix: Tensor) -> Tensor:
    """Return U V^T of A = U S V^T, without the directions that A does not have; (m, n).

    It is exact to 1e-16 / s^2 in a direction of s times the largest singular value, which is less
    than rounding A to float32 changes there, 1e-7 / s.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.mT).mT
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    values = squares.clamp(min=0).sqrt()
    inverse = torch.where(has_direction(values) > 0, 1 / torch.where(values > 0, values, 1), 0)
    factor: Tensor = matrix @ ((vectors * inverse) @ vectors.mT)
    return factor


def has_direction(values: Tensor) -> Tensor:
    """Return 1 where a singular value stands out of the rounding noise, else 0, like `values`.

    The singular vectors of the others are arbitrary: they must not enter an orthogonalisation.
    """
    return (values > RELATIVE_RANK_TOLERANCE * values.max()).to(values.dtype)


def _gram(matrix: Tensor) -> Tensor:
    """Return A^T A, (n, n), of which only the lower triangle is filled: `eigh` reads no more."""
    columns = matrix.shape[1]
    product = matrix.new_zeros(columns, columns)
    for start in range(0, columns, _COLUMNS):
        some = slice(start, start + _COLUMNS)
        product[start:, some] = matrix[:, start:].mT @ matrix[:, some]
    return product
