"""Polar factors agree with NumPy's SVD however small a singular value is."""

import numpy as np
import pytest
import torch

from mergekit_lit.merging.decompositions import leading, polar


def conditioned(rows: int, columns: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix whose singular values fall from 1 to 1 / condition, and its polar factor."""
    draw = np.random.default_rng(0)
    rank = min(rows, columns)
    left, right = (np.linalg.qr(draw.standard_normal((n, rank)))[0] for n in (rows, columns))
    return left * np.geomspace(1, 1 / condition, rank) @ right.T, left @ right.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 40), (40, 60)])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5])
def test_a_polar_factor_is_as_exact_as_float32_can_tell(shape, condition):
    matrix, expected = conditioned(*shape, condition)
    found = polar(torch.from_numpy(matrix)).numpy()
    rounded = np.linalg.svd(matrix.astype(np.float32).astype(np.float64), full_matrices=False)
    by_rounding = np.linalg.norm(rounded[0] @ rounded[2] - expected)
    error = np.linalg.norm(found - expected)
    assert error <= 1e-15 * condition**2 * np.linalg.norm(expected)
    assert error < 0.01 * by_rounding


@pytest.mark.parametrize("count", [0, 1, 7, 19, 20, 40])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_leading_triplets_are_those_of_an_svd(shape, count):
    matrix, _ = conditioned(*shape, 1e3)
    left, values, right = (part.numpy() for part in leading(torch.from_numpy(matrix), count))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(values, s[:count], rtol=1e-9)
    expected = u[:, :count] * s[:count] @ vt[:count]
    np.testing.assert_allclose(left * values @ right.T, expected, atol=1e-10)


def test_directions_that_a_matrix_does_not_have_are_0():
    draw = np.random.default_rng(1)
    matrix = draw.standard_normal((30, 3)) @ draw.standard_normal((3, 20))
    left, values, right = leading(torch.from_numpy(matrix), 8)
    assert not left[:, 3:].any()
    assert not right[:, 3:].any()
    assert float(values[3:].max()) < 1e-6 * float(values[0])
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    found = polar(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, u[:, :3] @ vt[:3], atol=1e-8)
    assert not polar(torch.zeros(4, 6, dtype=torch.float64)).any()
