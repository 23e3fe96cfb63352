"""The algebra of parameters, against NumPy and its own laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lit.core import params, specs


@pytest.fixture
def two(tiny_experts):
    return dict(tiny_experts.tuned[0]), dict(tiny_experts.tuned[1])


def floats(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def test_dot_and_norm_are_those_of_one_long_vector(two):
    left, right = (floats(tensors) for tensors in two)
    a = np.concatenate([left[name].numpy().ravel() for name in left])
    b = np.concatenate([right[name].numpy().ravel() for name in left])
    assert params.dot(left, right) == pytest.approx(float(a @ b), rel=1e-12)
    assert params.norm(left) == pytest.approx(math.sqrt(float(a @ a)), rel=1e-12)
    assert params.count(left) == a.size


def test_sums_of_halves_do_not_overflow():
    large = {"w": torch.full((1000,), 300.0, dtype=torch.float16)}
    assert params.norm(large) == pytest.approx(300 * math.sqrt(1000))


def test_add_undoes_subtract(two):
    left, right = two
    step = params.subtract(left, right)
    back = params.add(right, step)
    for name, tensor in left.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-14)


def test_add_scales_casts_once_and_leaves_what_has_no_step(two):
    base = {name: tensor.to(torch.bfloat16) for name, tensor in floats(two[0]).items()}
    step = {"token": torch.full((1, 1), 2.0)}
    moved = params.add(base, step, scale=0.5)
    assert moved["token"].dtype == torch.bfloat16
    assert torch.equal(moved["token"], (base["token"].float() + 1).to(torch.bfloat16))
    assert moved["block.weight"] is base["block.weight"]


def test_content_hash_sees_everything_but_the_order(two):
    left = two[0]
    plain = params.content_hash(left)
    assert plain == params.content_hash(dict(reversed(left.items())))
    assert plain == params.content_hash({n: t.clone() for n, t in left.items()})
    others = [
        {**left, "token": left["token"] + 1e-12},
        {**left, "token": left["token"].float()},
        {**left, "token": left["token"].flatten()},
        {("tokens" if n == "token" else n): t for n, t in left.items()},
        {**left, "token": -left["token"]},
    ]
    assert len({plain, *map(params.content_hash, others)}) == 6


def test_content_hash_ignores_strides():
    whole = torch.arange(6.0).reshape(2, 3)
    assert params.content_hash({"w": whole.T}) == params.content_hash({"w": whole.T.contiguous()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_tensor_and_counts(two, bad):
    damaged = {**two[0], "block.bias": two[0]["block.bias"].index_fill(0, torch.tensor([2]), bad)}
    message = "Expert 'x' must hold finite numbers, but 'block.bias' has 1 NaN or infinite of 7"
    with pytest.raises(ValueError, match=message):
        params.check_finite(damaged, source="Expert 'x'")
    params.check_finite(two[0], source="Expert 'x'")


def test_check_names_and_shapes(two):
    left, right = two
    specs.check_same_names_and_shapes(left, right, source="It")
    missing = {name: tensor for name, tensor in left.items() if name != "token"}
    with pytest.raises(ValueError, match="It and the base differ in 1 parameter names, first 'tok"):
        specs.check_same_names_and_shapes(missing, right, source="It")
    with pytest.raises(ValueError, match=r"'token': \(2, 1\) and \(1, 1\)"):
        specs.check_same_names_and_shapes({**left, "token": torch.ones(2, 1)}, right, source="It")


def test_prefixes(two):
    assert set(params.with_prefix({"a": two[0]["token"]}, "x.")) == {"x.a"}
    assert params.names_under(["x.a", "y.a", "x."], "x.") == {"a": "x.a", "": "x."}


def test_experts_are_frozen(tiny_experts):
    with pytest.raises(AttributeError):
        tiny_experts.names = ()
    assert len(replace(tiny_experts, tuned=tiny_experts.tuned[:2])) == 2


def test_is_finite_looks_at_every_entry():
    huge = torch.full((8,), 3e38)
    assert not bool(huge.sum().isfinite())
    assert params.is_finite(huge)
    assert params.is_finite(torch.tensor([1, 2]))
    assert params.is_finite(torch.zeros(0))
    for bad in ([1.0, math.nan], [math.inf, 1.0], [math.inf, -math.inf]):
        assert not params.is_finite(torch.tensor(bad))
