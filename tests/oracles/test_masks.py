"""Consensus, TALL masks and EMR against loops over flat task vectors in NumPy."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.expert_files import load_merged, save_merged
from mergekit_lit.merging import merge
from mergekit_lit.merging.methods.masks import emr, tall_masks


def flat(params, names):
    return np.concatenate([params[name].double().numpy().ravel() for name in names])


def vectors(experts):
    names = experts.merged_names()
    base = flat(experts.base, names)
    return base, [flat(tuned, names) - base for tuned in experts.tuned]


def reference_masks(taus, threshold):
    """Wang et al. 2024: where an expert's entry outweighs a share of the others' sum."""
    total = sum(taus)
    return [np.abs(tau) >= threshold * np.abs(total - tau) for tau in taus]


def reference_emr(taus):
    """Huang et al. 2024: elect, mask, rescale."""
    d = len(taus[0])
    unified = np.zeros(d)
    masks = [np.zeros(d) for _ in taus]
    for p in range(d):
        sign = 1.0 if sum(tau[p] for tau in taus) > 0 else -1.0
        agree = [t for t, tau in enumerate(taus) if tau[p] * sign > 0]
        unified[p] = sign * max((abs(taus[t][p]) for t in agree), default=0.0)
        for t in agree:
            masks[t][p] = 1
    scales = [
        np.abs(tau).sum() / np.abs(mask * unified).sum()
        for tau, mask in zip(taus, masks, strict=True)
    ]
    return unified, masks, scales


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.6, 3.0])
@pytest.mark.parametrize("agreement", [0, 1, 2, 3])
def test_consensus(make_experts, threshold, agreement):
    experts = make_experts(4)
    base, taus = vectors(experts)
    votes = sum(mask.astype(int) for mask in reference_masks(taus, threshold))
    expected = base + 0.3 * (votes >= agreement) * sum(taus)
    config = {"threshold": threshold, "agreement": agreement, "scale": 0.3}
    merged = merge(experts, "consensus", config=config)
    np.testing.assert_allclose(flat(merged.shared, experts.merged_names()), expected, rtol=1e-12)


def test_consensus_of_all_is_task_arithmetic_and_one_expert_is_enough(make_experts):
    everything = merge(make_experts(), "consensus", config={"agreement": 0, "scale": 0.3})
    for name, tensor in merge(make_experts(), "task_arithmetic").shared.items():
        torch.testing.assert_close(everything.shared[name], tensor)
    alone = make_experts(1)
    merged = merge(alone, "consensus", config={"scale": 1.0})
    for name in alone.merged_names():
        torch.testing.assert_close(merged.shared[name], alone.tuned[0][name])


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_tall_masks(tiny_experts, threshold):
    names = tiny_experts.merged_names()
    base, taus = vectors(tiny_experts)
    merged = merge(tiny_experts, "tall_masks", config={"threshold": threshold})
    np.testing.assert_allclose(flat(merged.shared, names), base + sum(taus), rtol=1e-12)
    masks = reference_masks(taus, threshold)
    for task, mask in zip(merged.tasks, masks, strict=True):
        expected = base + mask * sum(taus)
        np.testing.assert_allclose(flat(merged.for_task(task), names), expected, rtol=1e-12)


def test_emr(tiny_experts):
    names = tiny_experts.merged_names()
    base, taus = vectors(tiny_experts)
    unified, masks, scales = reference_emr(taus)
    merged = merge(tiny_experts, "emr")
    np.testing.assert_allclose(flat(merged.shared, names), base + unified, rtol=1e-12)
    for t, task in enumerate(merged.tasks):
        assert merged.scales[task] == pytest.approx(scales[t], rel=1e-12)
        expected = base + scales[t] * masks[t] * unified
        np.testing.assert_allclose(flat(merged.for_task(task), names), expected, rtol=1e-11)


def test_a_task_keeps_the_base_where_its_mask_is_false(tiny_experts):
    merged = merge(tiny_experts, "tall_masks", config={"threshold": 0.6})
    for task, masks in merged.masks.items():
        params = merged.for_task(task)
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            base, shared = tiny_experts.base[name], merged.shared[name]
            assert torch.equal(params[name][~mask], base[~mask])
            assert torch.equal(params[name][mask], shared[mask])


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
def test_statistics_are_still_the_merges(tiny_experts, method):
    merged = merge(tiny_experts, method, batch_norm="average")
    mean = torch.stack([tuned["norm.running_mean"] for tuned in tiny_experts.tuned]).mean(0)
    torch.testing.assert_close(merged.for_task("task1")["norm.running_mean"], mean)


@pytest.mark.parametrize("method", ["tall_masks", "emr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tasks_model_survives_the_file(tmp_path, make_experts, method, dtype):
    merged = merge(make_experts(dtype=dtype), method)
    save_merged(tmp_path / "m.safetensors", merged)
    read = load_merged(tmp_path / "m.safetensors")
    assert read.scales == merged.scales
    for task in merged.tasks:
        left, right = merged.for_task(task), read.for_task(task)
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", [tall_masks, emr])
def test_untuned_experts_stay_the_base_for_every_task(make_experts, method):
    experts = make_experts()
    untuned = type(experts)(**{**experts.__dict__, "tuned": [experts.base] * 3})
    merged = method(untuned)
    for task in experts.names:
        params = merged.for_task(task)
        assert all(torch.equal(params[name], tensor) for name, tensor in experts.base.items())


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("consensus", {"threshold": -1}, "`threshold` must be at least 0, but is -1"),
        ("consensus", {"agreement": -1}, "`agreement` must be at least 0, but is -1"),
        ("consensus", {"scale": -1}, "`scale` must be at least 0, but is -1"),
        ("tall_masks", {"threshold": -0.5}, "`threshold` must be at least 0, but is -0.5"),
    ],
)
def test_values_out_of_range(tiny_experts, method, config, message):
    with pytest.raises(ValueError, match=message):
        merge(tiny_experts, method, config=config)
