"""Veneers: what they do before and after a merge, together, and in the facts."""

import json
from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.registry import MERGE_METHODS, VENEERS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import equal_norms, merge


def uneven(make_experts, factors=(1.0, 4.0, 20.0)):
    """Return experts whose deltas are of very different lengths."""
    experts = make_experts(len(factors))
    tuned = [
        {
            n: t + (f - 1) * (t - experts.base[n]) if t.is_floating_point() else t
            for n, t in p.items()
        }
        for f, p in zip(factors, experts.tuned, strict=True)
    ]
    return replace(experts, tuned=tuned)


def lengths(experts, names=None):
    deltas = [
        experts.deltas(name).reshape(len(experts), -1) for name in names or experts.merged_names()
    ]
    return torch.cat(deltas, dim=1).norm(dim=1)


@pytest.mark.parametrize(
    ("to", "goal"), [("min", torch.amin), ("median", torch.median), ("mean", torch.mean)]
)
def test_experts_get_one_length(make_experts, to, goal):
    experts = uneven(make_experts)
    before = lengths(experts)
    after = lengths(equal_norms(experts, to=to))
    torch.testing.assert_close(after, goal(before).expand(3))
    each = equal_norms(experts, to=to, scope="tensor")
    for name in experts.merged_names():
        goal_here = goal(lengths(experts, [name]))
        torch.testing.assert_close(lengths(each, [name]), goal_here.expand(3))


def test_directions_and_everything_else_stay(make_experts):
    experts = uneven(make_experts)
    scaled = equal_norms(experts, to="min")
    for t, (tuned, before) in enumerate(zip(scaled.tuned, experts.tuned, strict=True)):
        assert list(tuned) == list(before)
        assert len(tuned) == len(before)
        for name in set(tuned) - set(experts.merged_names()):
            assert torch.equal(tuned[name], before[name])
        ratio = lengths(scaled)[t] / lengths(experts)[t]
        name = "block.weight"
        expected = experts.base[name] + ratio * (before[name] - experts.base[name])
        torch.testing.assert_close(tuned[name], expected)


def test_an_expert_that_did_not_move_stays(make_experts):
    experts = make_experts()
    experts = replace(experts, tuned=[experts.base, *experts.tuned[1:]])
    scaled = equal_norms(experts)
    assert all(torch.equal(scaled.tuned[0][name], t) for name, t in experts.base.items())
    assert lengths(scaled)[0] == 0


def test_half_precision_experts_are_rescaled_in_float32(make_experts):
    experts = make_experts(dtype=torch.bfloat16)
    scaled = equal_norms(experts)
    assert scaled.tuned[0]["block.weight"].dtype == torch.float32
    torch.testing.assert_close(lengths(scaled), lengths(scaled).mean().expand(3))
    assert merge(experts, "average", veneers=[("equal_norms", {})]).shared["token"].dtype == (
        torch.bfloat16
    )


DATA_FREE = [v.name for v in VENEERS if v.facts.get("data", "none") == "none"]

DEPTHS = {
    "stem.weight": TensorInfo("convolution", 0, "stem"),
    "norm.weight": TensorInfo("norm", 1, "layer1"),
    "block.weight": TensorInfo("linear", 2, "layer1"),
    "block.bias": TensorInfo("linear", 3, "layer2"),
    "token": TensorInfo("embedding", 4, "final"),
}


def deep(experts):
    return replace(
        experts, structure={**experts.structure, **DEPTHS, "logit_scale": DEPTHS["token"]}
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m", "tall_masks"])
def test_lines_scales_any_result_by_depth(tiny_experts, method):
    experts = deep(tiny_experts)
    plain = merge(experts, method)
    scaled = merge(experts, method, veneers=[("lines", {"alpha": 0.2, "beta": 0.6})])
    for name, factor in {"stem.weight": 0.2, "block.weight": 0.5, "block.bias": 0.8}.items():
        base = experts.base[name]
        torch.testing.assert_close(scaled.shared[name], base + factor * (plain.shared[name] - base))
    assert scaled.masks.keys() == plain.masks.keys()
    assert torch.equal(scaled.shared["norm.running_var"], plain.shared["norm.running_var"])


def test_lines_by_default_gives_the_first_blocks_the_averages_length(tiny_experts):
    experts = deep(tiny_experts)
    veneered = merge(experts, "task_arithmetic", config={"scale": 1.0}, veneers=[("lines", {})])
    by_method = merge(experts, "lines", config={"beta": 2 / 3})  # alpha 1/3, the last block whole
    for name, tensor in by_method.shared.items():
        torch.testing.assert_close(veneered.shared[name], tensor)
    still = merge(experts, "task_arithmetic", config={"scale": 0}, veneers=[("lines", {})])
    assert torch.equal(still.shared["block.weight"], experts.base["block.weight"])


def test_veneers_act_before_and_after_in_their_order(make_experts):
    experts = deep(uneven(make_experts))
    both = merge(
        experts,
        "average",
        veneers=[("lines", {"alpha": 0.5, "beta": 0}), ("equal_norms", {"to": "min"})],
    )
    average = merge(equal_norms(experts, to="min"), "average")
    for name in experts.merged_names():
        base = experts.base[name]
        torch.testing.assert_close(both.shared[name], base + (average.shared[name] - base) / 2)


def test_facts_tell_the_veneers_and_no_coefficients(tiny_experts):
    facts = merge(tiny_experts, "average", veneers=[("lines", {"alpha": 0.5})]).facts
    assert facts["veneers"] == [{"name": "lines", "config": {"alpha": 0.5, "beta": None}}]
    assert facts["coefficients"] is None
    assert json.loads(json.dumps(facts)) == facts


def test_observers_see_what_the_method_gets(make_experts):
    seen = {}

    class Watch:
        def on_merge_start(self, experts, method, config):
            pass

        def on_merge_tensor(self, name, deltas):
            seen[name] = deltas.reshape(len(deltas), -1)

        def on_merge_end(self, experts, merged):
            pass

    merge(uneven(make_experts), "average", veneers=[("equal_norms", {})], observers=[Watch()])
    norms = torch.cat(list(seen.values()), dim=1).norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(3))


@pytest.mark.parametrize("veneer", DATA_FREE)
@pytest.mark.parametrize("method", ["average", "ties", "emr", "wudi"])
def test_untuned_experts_still_give_the_base(tiny_experts, veneer, method):
    untuned = replace(tiny_experts, tuned=[tiny_experts.base] * 3)
    merged = merge(untuned, method, veneers=[(veneer, {})])
    for name, tensor in tiny_experts.base.items():
        assert torch.equal(merged.shared[name], tensor)


@pytest.mark.parametrize("veneer", DATA_FREE)
def test_every_veneer_is_declared_and_leaves_inputs_alone(make_experts, veneer):
    entry = VENEERS.get(veneer)
    assert entry.facts["position"] in ("before", "after")
    assert entry.facts["source"]
    assert "Source:" in (entry.function.__doc__ or "")
    experts, untouched = make_experts(), make_experts()
    for method in MERGE_METHODS.names():
        if MERGE_METHODS.get(method).facts["data"] == "none":
            two = make_experts(2)
            merged = merge(two, method, veneers=[(veneer, {})])
            assert all(bool(t.isfinite().all()) for t in merged.shared.values())
    merge(experts, "ties", veneers=[(veneer, {})])
    for params, reference in zip(experts.tuned, untouched.tuned, strict=True):
        assert all(torch.equal(params[name], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize(
    ("veneers", "error", "message"),
    [
        ([("line", {})], KeyError, "No veneer named 'line'. Did you mean 'lines'?"),
        ([("lines", {"alfa": 1})], KeyError, "No parameter of 'lines' named 'alfa'"),
        ([("lines", {"alpha": -1})], ValueError, "`alpha` must be at least 0, but is -1"),
        ([("lines", {"beta": -1})], ValueError, "`beta` must be at least 0, but is -1"),
        ([("equal_norms", {"to": "max"})], TypeError, "`to` of 'equal_norms' must be one of 'min'"),
    ],
)
def test_bad_requests_get_one_line(tiny_experts, veneers, error, message):
    with pytest.raises(error) as caught:
        merge(tiny_experts, "average", veneers=veneers)
    assert message in caught.value.args[0]


def test_a_position_that_is_none_is_named(tiny_experts, monkeypatch):
    monkeypatch.setattr(VENEERS, "_entries", dict(VENEERS._entries))

    @VENEERS.add(position="during", source="nobody")
    def odd(experts):
        """Do nothing."""

    with pytest.raises(ValueError, match=r"No position .declared by 'odd'. named 'during'"):
        merge(tiny_experts, "average", veneers=[("odd", {})])
