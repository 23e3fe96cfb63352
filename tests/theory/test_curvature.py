"""Curvature against matrices whose eigenvalues are known."""

import pytest
import torch

from mergekit_lit.theory.curvature import (
    random_direction,
    rayleigh,
    secant_smoothness,
    top_eigenvalue,
)


def symmetric(values, seed=0):
    """A random symmetric matrix with these eigenvalues."""
    draw = torch.Generator().manual_seed(seed)
    size = len(values)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("largest", [5.0, -5.0])
def test_the_dominant_eigenvalue_is_found_with_its_sign(largest):
    matrix = symmetric([largest, *torch.linspace(-1, 1, 59).tolist()])
    start = random_direction(torch.zeros(60, dtype=torch.float64), 0)
    found = top_eigenvalue(lambda v: matrix @ v, start, steps=40, tolerance=1e-8)
    assert found.value == pytest.approx(largest, rel=1e-8)
    assert found.low <= largest * (1 + 1e-9 * (largest < 0)) + 1e-9
    assert found.products < 30


@pytest.mark.parametrize("seed", range(8))
def test_an_eigenvalue_lies_in_the_interval_and_none_is_exceeded(seed):
    values = torch.linspace(0.1, 3.0, 50).tolist()
    matrix = symmetric(values, seed)
    for steps in (1, 3, 8):
        start = random_direction(torch.zeros(50, dtype=torch.float64), seed)
        found = top_eigenvalue(lambda v: matrix @ v, start, steps=steps)
        assert found.products <= steps
        assert found.value <= 3.0 + 1e-9
        assert any(found.low - 1e-9 <= value <= found.high + 1e-9 for value in values)


def test_a_space_that_is_exhausted_ends_the_iteration():
    found = top_eigenvalue(lambda v: 2.0 * v, torch.ones(4, dtype=torch.float64), steps=10)
    assert (found.value, found.products) == (pytest.approx(2.0), 1)
    zero = top_eigenvalue(torch.zeros_like, torch.ones(4), steps=10)
    assert zero.value == 0


def test_hessian_vector_products_of_a_network():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, dtype=torch.float64)

    def loss(v):
        return (torch.tanh(x @ v) - y).square().mean()

    at = torch.randn(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, at)

    def product(v):
        return torch.autograd.functional.hvp(loss, at, v)[1]

    expected = torch.linalg.eigvalsh(hessian)
    found = top_eigenvalue(product, random_direction(at, 0), steps=4)
    assert found.value == pytest.approx(float(expected[expected.abs().argmax()]), rel=1e-8)


def test_curvature_along_a_direction():
    matrix = torch.diag(torch.tensor([1.0, 4.0]))
    assert rayleigh(lambda v: matrix @ v, torch.tensor([3.0, 0.0])) == pytest.approx(1.0)
    assert rayleigh(lambda v: matrix @ v, torch.tensor([1.0, 1.0])) == pytest.approx(2.5)


def test_secants_of_a_quadratic_lie_within_its_spectrum():
    matrix = symmetric([0.5, 1.0, 4.0])
    points = [torch.randn(3, dtype=torch.float64) for _ in range(12)]
    gradients = [matrix @ point for point in points]
    assert secant_smoothness(points, gradients, quantile=0.0).value >= 0.5
    largest = secant_smoothness(points, gradients, quantile=1.0)
    assert largest.value <= 4.0
    i, j = largest.pair
    apart, turned = points[i] - points[j], gradients[i] - gradients[j]
    assert float(turned.norm() / apart.norm()) == pytest.approx(largest.value)
    axis = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    along = [t * axis for t in (0.0, 1.0, 2.5)]
    assert secant_smoothness(along, [matrix @ p for p in along]).value == pytest.approx(4.0)


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        top_eigenvalue(lambda v: v, torch.ones(2), steps=0)
    with pytest.raises(ValueError, match="must start from a vector that is not zero"):
        top_eigenvalue(lambda v: v, torch.zeros(2))
    with pytest.raises(ValueError, match="product must be finite"):
        top_eigenvalue(lambda v: v * torch.nan, torch.ones(2))
    with pytest.raises(ValueError, match="needs one that is not zero"):
        rayleigh(lambda v: v, torch.zeros(2))
    with pytest.raises(ValueError, match="at least two points that differ"):
        secant_smoothness([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)])
