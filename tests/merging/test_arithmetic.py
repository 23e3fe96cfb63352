"""MetaGPT's optimality, and LiNeS by depth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge, metagpt
from mergekit_lit.merging.methods.arithmetic import depth_scales


def orthogonal_experts(make_experts, lengths):
    """Return experts whose deltas lie on different axes of one tensor."""
    experts = make_experts(len(lengths))
    tuned = []
    for t, length in enumerate(lengths):
        weight = experts.base["block.weight"].clone()
        weight[t, t] += length
        tuned.append({**experts.base, "block.weight": weight})
    return replace(experts, tuned=tuned)


def test_metagpt_minimises_the_weighted_squares_of_orthogonal_deltas(make_experts):
    experts = orthogonal_experts(make_experts, [1.0, 2.0, 3.0])
    taus = np.stack([experts.deltas("block.weight")[t].numpy().ravel() for t in range(3)])
    squares = (taus**2).sum(axis=1)

    def loss(coefficients, weights):
        theta = coefficients @ taus
        return sum(w * ((theta - tau) ** 2).sum() for w, tau in zip(weights, taus, strict=True))

    best = metagpt(experts).numpy()
    np.testing.assert_allclose(best, squares / squares.sum(), rtol=1e-12)
    draw = np.random.default_rng(0)
    for _ in range(50):
        other = best + 0.1 * draw.standard_normal(3)
        assert loss(other, squares) > loss(best, squares)
    # Without the weights the minimum is the average.
    assert loss(np.full(3, 1 / 3), np.ones(3)) < loss(best, np.ones(3))


def test_metagpt_of_experts_that_did_not_move_shares_alike(make_experts):
    experts = make_experts()
    untuned = replace(experts, tuned=[experts.base] * 3)
    torch.testing.assert_close(metagpt(untuned, scale=1.5), torch.full((3,), 0.5).double())


def deep(experts, depths):
    """Return experts whose tensors are given blocks: name -> (group, depth)."""
    structure = {
        name: replace(info, group=depths[name][0], depth=depths[name][1])
        if name in depths
        else info
        for name, info in experts.structure.items()
    }
    return replace(experts, structure=structure)


DEPTHS = {
    "stem.weight": ("stem", 0),
    "norm.weight": ("layer1", 1),
    "block.weight": ("layer1", 2),
    "block.bias": ("layer2", 4),
    "token": ("layer3", 5),
    "logit_scale": ("final", 6),
}


def test_lines_adds_more_of_deeper_blocks(tiny_experts):
    experts = deep(tiny_experts, DEPTHS)
    merged = merge(experts, "lines", config={"alpha": 0.1, "beta": 0.6})
    wanted = {
        "stem.weight": 0.1,  # outside the blocks
        "norm.weight": 0.1,
        "block.weight": 0.3,
        "block.bias": 0.5,
        "token": 0.7,
        "logit_scale": 0.1,
    }
    for name, scale in wanted.items():
        expected = experts.base[name] + scale * experts.deltas(name).sum(0)
        torch.testing.assert_close(merged.shared[name], expected)


def test_lines_by_default_starts_at_the_average(tiny_experts):
    merged = merge(deep(tiny_experts, DEPTHS), "lines", config={"beta": 0})
    for name, tensor in merge(tiny_experts, "average").shared.items():
        torch.testing.assert_close(merged.shared[name], tensor)


def test_models_of_one_block_or_none_are_scaled_alike():
    one = {"a": TensorInfo("linear", 3, "blocks.0"), "b": TensorInfo("norm", 0, "stem")}
    assert depth_scales(one, 0.2, 0.5) == {"a": 0.2, "b": 0.2}
    assert depth_scales({"b": one["b"]}, 0.2, 0.5) == {"b": 0.2}


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_negative_scales_are_refused(tiny_experts, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0, but is -0.1"):
        merge(tiny_experts, "lines", config={name: -0.1})
