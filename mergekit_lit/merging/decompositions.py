"""This file is singular values and vectors by way of the smaller Gram matrix, in float64.

An eigendecomposition of A^T A (or A A^T) takes a fraction of the time of an SVD of A, and nothing
of the size of the larger side beyond what is asked for. Squaring costs half of the digits: values
below about 1e-7 of the largest are noise, which the callers' threshold of 1e-6 leaves out.

NumPy and SciPy compute them: theirs is the product that makes one half of a Gram matrix only, and
the decomposition that finds the leading vectors only.
"""

import numpy as np
import torch
from torch import Tensor

# Singular values below this share of the largest are rounding noise of float32 deltas, not
# directions: they are left out instead of being blown up to the size of the others.
RELATIVE_RANK_TOLERANCE = 1e-6


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
    values, right = _right(matrix, count)
    right = right * has_direction(values)
    left = matrix @ right / torch.where(values > 0, values, 1)
    return left[:, :count], values[:count], right[:, :count]


def polar(matrix: Tensor) -> Tensor:
    """Return U V^T of A = U S V^T, without the directions that A does not have; (m, n).

    It is exact to 1e-16 / s^2 in a direction of s times the largest singular value, which is less
    than rounding A to float32 changes there, 1e-7 / s.
    """
    rows = matrix.numpy()
    wide = rows.shape[0] < rows.shape[1]
    values, right = _right(matrix.mT if wide else matrix, min(rows.shape))
    # U V^T = A V S^-1 V^T, where V S^-1 V^T is a Gram matrix, too.
    roots = right * (has_direction(values) / torch.where(values > 0, values, 1)).sqrt()
    inverse = _gram(roots.mT)
    return torch.from_numpy(inverse @ rows if wide else rows @ inverse)


def has_direction(values: Tensor) -> Tensor:
    """Return 1 where a singular value stands out of the rounding noise, else 0, like `values`.

    The singular vectors of the others are arbitrary: they must not enter an orthogonalisation.
    """
    return (values > RELATIVE_RANK_TOLERANCE * values.max()).to(values.dtype)


def _right(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return at least `count` singular values of a matrix (m, n), m >= n, largest first, and V."""
    from scipy.linalg import eigh

    gram, last = _gram(matrix), matrix.shape[1] - 1
    if 2 * count <= last:
        squares, vectors = eigh(gram, subset_by_index=(min(last + 1 - count, last), last))
    else:
        squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(squares.clip(min=0))
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def _gram(matrix: Tensor) -> np.ndarray:
    """Return A^T A, (n, n)."""
    rows = matrix.numpy()
    # Both factors are one array, by which NumPy knows that half of the product is enough.
    product: np.ndarray = rows.T @ rows
    return product
