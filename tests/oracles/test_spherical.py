"""Averages on spheres against literal NumPy transcriptions of their formulas."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.spherical import karcher, model_stock, multislerp, nuslerp, slerp


def a_slice(shape=(6, 4), count=2, seed=0, spread=1.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw, dtype=torch.float64)
    deltas = spread * torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    return Slice("w", base.to(dtype), deltas.to(dtype), TensorInfo("linear", 0, "g"), {}, 0)


def points(tensor, space="weights"):
    """Return the vectors, each flat."""
    deltas = tensor.deltas.numpy()
    base = tensor.base.numpy()
    return [(base + d if space == "weights" else d).ravel() for d in deltas]


def merged(tensor, step, space="weights"):
    return ((tensor.base if space == "weights" else 0) + step).numpy().ravel()


def reference_slerp(a, b, t):
    """Shoemake 1985, with the ends' own lengths."""
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def reference_multislerp(xs, p):
    """Methods' table, item 8, with the tangent part that is always zero."""
    us = [x / np.linalg.norm(x) for x in xs]
    mu = sum(w * u for w, u in zip(p, us, strict=True))
    mu = mu / np.linalg.norm(mu)
    v = sum(w * (u - (u @ mu) * mu) for w, u in zip(p, us, strict=True))
    size = np.linalg.norm(v)
    y = mu * np.cos(size) + (v * np.sin(size) / size if size > 0 else 0)
    return y * sum(w * np.linalg.norm(x) for w, x in zip(p, xs, strict=True))


def reference_karcher(xs, p, iterations):
    us = [x / np.linalg.norm(x) for x in xs]
    mu = sum(w * u for w, u in zip(p, us, strict=True))
    mu = mu / np.linalg.norm(mu)
    for _ in range(iterations):
        v = np.zeros_like(mu)
        for w, u in zip(p, us, strict=True):
            angle = np.arccos(np.clip(u @ mu, -1, 1))
            v = v + w * angle / np.sin(angle) * (u - np.cos(angle) * mu)
        size = np.linalg.norm(v)
        if size < 1e-5:
            break
        mu = np.cos(size) * mu + np.sin(size) * v / size
    return mu * sum(w * np.linalg.norm(x) for w, x in zip(p, xs, strict=True))


def reference_model_stock(deltas):
    """Jang et al. 2024: the step of one layer."""
    n = len(deltas)
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            norms = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            cosines.append(deltas[i] @ deltas[j] / norms)
    c = np.mean(cosines)
    return n * c / (1 + (n - 1) * c) * np.mean(deltas, axis=0)


@pytest.mark.parametrize("position", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])  # a great circle, and its chord
def test_slerp(position, spread):
    tensor = a_slice(spread=spread)
    expected = reference_slerp(*points(tensor), position)
    found = merged(tensor, slerp(tensor, position=position))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("space", ["weights", "deltas"])
@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 3, 3), (5,)])
def test_nuslerp(space, along, shape):
    tensor = a_slice(shape, spread=0.7)
    step = nuslerp(tensor, weights=[1, 3], along=along, space=space)
    a, b = (x.reshape(shape[0], -1) for x in points(tensor, space))
    if along == "tensor" or len(shape) < 2:
        expected = reference_slerp(a.ravel(), b.ravel(), 0.75)
    elif along == "rows":
        expected = np.stack([reference_slerp(x, y, 0.75) for x, y in zip(a, b, strict=True)])
    else:
        columns = [reference_slerp(x, y, 0.75) for x, y in zip(a.T, b.T, strict=True)]
        expected = np.stack(columns, axis=1)
    np.testing.assert_allclose(merged(tensor, step, space), expected.ravel(), rtol=1e-11)


@pytest.mark.parametrize("space", ["weights", "deltas"])
@pytest.mark.parametrize("weights", [None, [2, 1, 1, 0]])
def test_multislerp_and_karcher(space, weights):
    tensor = a_slice(count=4, spread=0.5)
    p = np.full(4, 0.25) if weights is None else np.array(weights) / sum(weights)
    xs = points(tensor, space)
    found = merged(tensor, multislerp(tensor, weights=weights, space=space), space)
    np.testing.assert_allclose(found, reference_multislerp(xs, p), rtol=1e-11)
    for iterations in (0, 1, 10):
        step = karcher(tensor, weights=weights, iterations=iterations, space=space)
        expected = reference_karcher(xs, p, iterations)
        np.testing.assert_allclose(merged(tensor, step, space), expected, rtol=1e-9)


def test_the_karcher_mean_of_two_is_half_way():
    tensor = a_slice(spread=0.7)
    same_length = tensor.deltas + tensor.base
    same_length = same_length / same_length.flatten(1).norm(dim=1)[:, None, None]
    turned = Slice("w", tensor.base, same_length - tensor.base, tensor.info, {}, 0)
    torch.testing.assert_close(karcher(turned), slerp(turned, position=0.5))


def test_lengths_are_kept():
    tensor = a_slice(count=3, spread=1.0)
    lengths = (tensor.deltas + tensor.base).flatten(1).norm(dim=1)
    for method in (multislerp, karcher):
        result = tensor.base + method(tensor)
        torch.testing.assert_close(result.norm(), lengths.mean())


@pytest.mark.parametrize("count", [2, 3, 6])
def test_model_stock(count):
    tensor = a_slice(count=count)
    shared = Slice("w", tensor.base, tensor.deltas + 1, tensor.info, {}, 0)
    expected = reference_model_stock(points(shared, "deltas"))
    np.testing.assert_allclose(model_stock(shared).numpy().ravel(), expected, rtol=1e-12)


def test_model_stock_stays_where_experts_are_opposed_and_takes_one_whole():
    delta = torch.tensor([1.0, -2.0])
    opposed = Slice("w", torch.zeros(2), torch.stack([delta, -delta]), a_slice().info, {}, 0)
    assert not model_stock(opposed).any()
    alone = Slice("w", torch.zeros(2), delta[None], a_slice().info, {}, 0)
    torch.testing.assert_close(model_stock(alone), delta)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("method", [slerp, nuslerp, multislerp, karcher, model_stock])
def test_awkward_sizes(method, shape):
    for spread in (0.1, 10.0):
        step = method(a_slice(shape, spread=spread))
        assert step.shape == shape
        assert torch.isfinite(step).all()


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_directions_that_cancel_give_the_mean(method):
    base = torch.zeros(3, dtype=torch.float64)
    delta = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    tensor = Slice("w", base, torch.stack([delta, -delta]), a_slice().info, {}, 0)
    torch.testing.assert_close(method(tensor), base)
    one_zero = Slice("w", base, torch.stack([delta, 0 * delta]), a_slice().info, {}, 0)
    torch.testing.assert_close(method(one_zero), delta / 2)


def test_rows_and_columns_of_zeros_are_joined_straight():
    tensor = a_slice()
    deltas = tensor.deltas.clone()
    deltas[0, 2] = 0
    deltas[1, :, 1] = 0
    for along in ("rows", "columns"):
        step = nuslerp(
            Slice("w", tensor.base, deltas, tensor.info, {}, 0), along=along, space="deltas"
        )
        assert torch.isfinite(step).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: slerp(s, position=1.5), r"`position` must lie in \[0, 1\], but is 1.5"),
        (lambda s: nuslerp(s, weights=[1]), "one number for each of the 2 experts, but holds 1"),
        (lambda s: nuslerp(s, weights=[0, 0]), "`weights` must be at least 0 and not all 0"),
        (lambda s: multislerp(s, weights=[1, -1]), "`weights` must be at least 0 and not all 0"),
        (lambda s: karcher(s, iterations=-1), "`iterations` must be at least 0, but is -1"),
    ],
)
def test_values_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(a_slice())
