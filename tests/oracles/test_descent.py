"""WUDI: gradient against autograd, Adam against torch's, closed form against the loss."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.descent import wudi


def a_slice(shape=(6, 9), count=3, kind="linear", size=0.01, deltas=None):
    if deltas is None:
        draw = torch.Generator().manual_seed(2)
        deltas = size * torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    base = torch.zeros_like(deltas[0])
    return Slice("w", base, deltas, TensorInfo(kind, 0, "g"), {}, 0)


def loss(matrix, deltas):
    """Cheng et al. 2025: sum_t ||(M - Delta_t) Delta_t^T||_F^2 / ||Delta_t||_F^2."""
    return sum(((matrix - d) @ d.T).square().sum() / d.square().sum() for d in deltas)


def reference_adam(deltas, lr, steps):
    """The paper's procedure: torch's Adam on autograd's gradient."""
    matrix = deltas.sum(dim=0).clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(matrix, deltas).backward()
        optimizer.step()
    return matrix.detach()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize(("lr", "steps"), [(1e-5, 40), (1e-3, 15)])
def test_adam_is_the_papers_procedure(shape, lr, steps):
    tensor = a_slice(shape)
    expected = reference_adam(tensor.deltas, lr, steps)
    found = wudi(tensor, lr=lr, steps=steps)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    assert loss(found, tensor.deltas) < loss(tensor.deltas.sum(dim=0), tensor.deltas)


def test_no_steps_give_the_sum():
    tensor = a_slice()
    torch.testing.assert_close(wudi(tensor, steps=0), tensor.deltas.sum(dim=0))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 40)])  # A of full rank and not
def test_the_exact_solution_has_no_gradient(shape):
    tensor = a_slice(shape, size=1.0)
    matrix = wudi(tensor, solver="exact", ridge=1e-10).requires_grad_()
    loss(matrix, tensor.deltas).backward()
    assert matrix.grad.abs().max() < 1e-6
    assert loss(matrix, tensor.deltas) < loss(wudi(tensor, lr=1e-2), tensor.deltas)


def test_the_declared_rates_reach_the_solution_of_larger_deltas_than_the_papers():
    tensor = a_slice((16, 24), size=4e-3)
    start = loss(tensor.deltas.sum(dim=0), tensor.deltas)
    least = loss(wudi(tensor, solver="exact", ridge=1e-10), tensor.deltas)
    _, high = MERGE_METHODS.get("wudi").facts["search"]["lr"]
    left = [
        float((loss(wudi(tensor, lr=lr), tensor.deltas) - least) / (start - least))
        for lr in (1e-5, high)
    ]
    assert left[1] < 0.01 < 0.1 < left[0]


def test_the_exact_solution_does_not_blow_up_where_deltas_hardly_look():
    # Two experts of one direction, and a column that moved a thousandth as far, and oppositely.
    u = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    row = torch.tensor([[1.0, 1e-3]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1e-3]], dtype=torch.float64)
    deltas = torch.stack([u @ row, u.flip(0) @ other])
    whole = wudi(a_slice(deltas=deltas), solver="exact")
    assert whole.abs().max() < 2 * deltas.abs().max()
    nearly = wudi(a_slice(deltas=deltas), solver="exact", ridge=1e-10)
    assert nearly.abs().max() > 100 * deltas.abs().max()


def test_the_exact_solution_is_regmean_of_the_deltas_second_moments():
    deltas = a_slice((4, 5)).deltas.numpy()
    grams = [d.T @ d / np.sum(d**2) for d in deltas]
    left = sum(d @ g for d, g in zip(deltas, grams, strict=True))
    expected = left @ np.linalg.inv(sum(grams))
    found = wudi(a_slice((4, 5)), solver="exact", ridge=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_tasks_that_share_no_inputs_lose_nothing(solver):
    """Deltas with orthogonal row spaces: their sum is the minimum, of loss 0."""
    deltas = torch.zeros(2, 4, 6, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    deltas[0, :, :3] = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    deltas[1, :, 3:] = torch.randn(4, 3, generator=draw, dtype=torch.float64)
    found = wudi(a_slice(deltas=deltas), solver=solver, ridge=1e-10)
    torch.testing.assert_close(found, deltas.sum(dim=0), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_convolutions_zeros_and_other_tensors(solver):
    convolution = a_slice((3, 2, 3, 3), kind="convolution")
    matrix = a_slice(deltas=convolution.deltas.flatten(2))
    step = wudi(convolution, solver=solver, scale=0.5)
    torch.testing.assert_close(step.flatten(1), 0.5 * wudi(matrix, solver=solver))
    assert not wudi(a_slice(size=0.0), solver=solver).any()
    for shape, kind in [((), "other"), ((5,), "linear"), ((0, 3), "linear"), ((2, 3), "embedding")]:
        tensor = a_slice(shape, kind=kind)
        assert not wudi(tensor, solver=solver).any()
        mean = wudi(tensor, solver=solver, rest="mean", scale=0.5)
        torch.testing.assert_close(mean, 0.5 * tensor.deltas.mean(dim=0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lr": 0}, "`lr` must be above 0, but is 0"),
        ({"ridge": -1e-3}, "`ridge` must be above 0, but is -0.001"),
        ({"steps": -1}, "`steps` must be at least 0, but is -1"),
        ({"scale": -1}, "`scale` must be at least 0, but is -1"),
    ],
)
def test_values_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        wudi(a_slice(), **config)
