"""Patterns: which tensors they mean, values that differ by tensor, and merges under them."""

import json
from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge, merge_many, select
from mergekit_lit.merging.patterns import Gradient, depth_places, matching

NAMES = [
    "patch_embed.proj.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.mlp.fc1.weight",
    "blocks.10.attn.qkv.weight",
    "fc.weight",
]
DEEP = {
    "stem": TensorInfo("convolution", 0, "stem"),
    **{f"blocks.{i}": TensorInfo("linear", i + 1, f"blocks.{i}") for i in range(5)},
    "norm": TensorInfo("norm", 6, "final"),
}


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("*", [0, 1, 2, 3, 4]),
        ("blocks.*.attn.*", [1, 3]),
        ("attn", [1, 3]),
        ("blocks.1", [1, 2]),  # and not blocks.10
        ("fc.*|patch_embed.*", [0, 4]),
        ("fc", [4]),  # a whole part, not the start of one
        ("fc.weight", [4]),
        ("re:blocks\\.\\d+\\.attn.*", [1, 3]),
        ("re:.*fc\\d?.weight", [2, 4]),
        ("blocks.?.*", [1, 2]),
    ],
)
def test_what_a_pattern_matches(pattern, places):
    assert matching(pattern, NAMES, source="x") == [NAMES[i] for i in places]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.*.atn.*", r"'blocks.\*.atn.\*' matches none of 5. Near it: .*blocks.1.attn.qkv"),
        ("atn", "Near it: attn"),
        ("re:(", "must be a regular expression after 're:', but is not"),
        ("", "'' matches none of 5"),
    ],
)
def test_patterns_that_match_nothing_name_what_is_near(pattern, message):
    with pytest.raises(ValueError, match=message):
        matching(pattern, NAMES, source="`exclude`")


def test_gradients_go_from_the_first_block_to_the_last():
    places = depth_places(DEEP)
    values = {name: Gradient((0.0, 1.0, 0.5)).at(place) for name, place in places.items()}
    assert [values[f"blocks.{i}"] for i in range(5)] == [0.0, 0.5, 1.0, 0.75, 0.5]
    assert (values["stem"], values["norm"]) == (0.0, 0.5)
    assert Gradient((0.2, 0.4)).at(1.0) == 0.4


def steps(merged, experts):
    return {name: merged.shared[name] - experts.base[name] for name in experts.merged_names()}


RULES = {"block.weight|token": 0.5, "stem": 0.1, "*": 0.2}
RULES_OF = {"block.weight": 0.5, "token": 0.5, "stem.weight": 0.1}


@pytest.mark.parametrize("method", ["task_arithmetic", "metagpt", "magmax", "ties", "tsv_m"])
def test_each_tensor_is_merged_under_its_own_scale(tiny_experts, method):
    merged = merge(tiny_experts, method, config={"scale": RULES})
    for name in tiny_experts.merged_names():
        alone = merge(tiny_experts, method, config={"scale": RULES_OF.get(name, 0.2)})
        assert torch.equal(merged.shared[name], alone.shared[name]), name
    assert merged.facts["coefficients"] is None


def test_first_match_wins_and_what_none_matches_keeps_the_default(tiny_experts):
    merged = merge(tiny_experts, "task_arithmetic", config={"scale": {"stem": 0.1, "*.weight": 1}})
    for name, scale in {"stem.weight": 0.1, "block.weight": 1.0, "block.bias": 0.3}.items():
        alone = merge(tiny_experts, "task_arithmetic", config={"scale": scale})
        assert torch.equal(merged.shared[name], alone.shared[name]), name


def test_values_over_the_depth(tiny_experts):
    structure = {
        name: replace(info, group=f"blocks.{info.depth}")
        for name, info in tiny_experts.structure.items()
    }
    experts = replace(tiny_experts, structure=structure)
    merged = merge(experts, "task_arithmetic", config={"scale": [0.1, 0.7]})
    for name, scale in {"stem.weight": 0.1, "block.weight": 0.7}.items():
        alone = merge(experts, "task_arithmetic", config={"scale": scale})
        assert torch.equal(merged.shared[name], alone.shared[name]), name


def test_a_kernels_own_parameters_may_differ_by_tensor(tiny_experts):
    config = {"reach": {"block": 0.02, "*": 1.0}}
    merged = merge(tiny_experts, "nearswap", config=config)
    near = merge(tiny_experts, "nearswap", config={"reach": 0.02})
    far = merge(tiny_experts, "nearswap", config={"reach": 1.0})
    assert torch.equal(merged.shared["block.weight"], near.shared["block.weight"])
    assert torch.equal(merged.shared["stem.weight"], far.shared["stem.weight"])


def test_groups_of_unlike_density_are_trimmed_each_as_a_model_of_its_own(tiny_experts):
    merged = merge(tiny_experts, "ties", config={"density": {"block": 0.5, "*": 0.2}})
    block = merge(select(tiny_experts, include=["block"]), "ties", config={"density": 0.5})
    rest = merge(select(tiny_experts, exclude=["block"]), "ties", config={"density": 0.2})
    for name in tiny_experts.merged_names():
        own = block if name.startswith("block") else rest
        assert torch.equal(merged.shared[name], own.shared[name]), name


def test_values_by_pattern_are_recorded_in_their_order_and_can_be_given_again(tiny_experts):
    config = {"scale": {"token": 0.9, "block": [0.1, 0.2], "*": 0.4}}
    merged = merge(tiny_experts, "task_arithmetic", config=config)
    # JSON files sort their keys: what is recorded must not hang on the order of a mapping.
    recorded = json.loads(json.dumps(merged.facts["config"], sort_keys=True))
    assert [rule["filter"] for rule in recorded["scale"]] == ["token", "block", "*"]
    again = merge(tiny_experts, "task_arithmetic", config=recorded)
    assert again.facts == merged.facts
    assert all(torch.equal(again.shared[name], t) for name, t in merged.shared.items())


def test_filters_as_mergekit_writes_them(tiny_experts):
    rules = [{"filter": "block", "value": 0.5}, {"value": 0.3}]
    merged = merge(tiny_experts, "task_arithmetic", config={"scale": rules})
    same = merge(tiny_experts, "task_arithmetic", config={"scale": {"block": 0.5, "*": 0.3}})
    assert all(torch.equal(same.shared[name], t) for name, t in merged.shared.items())


@pytest.mark.parametrize(
    ("method", "config", "error", "message"),
    [
        ("ties", {"scale": {"blok": 1.0}}, ValueError, "`scale` of 'ties' must have patterns that"),
        ("ties", {"scale": {"*": 1.0, "block": 0.5}}, ValueError, "before 'block' match all"),
        ("ties", {"scale": {"block": "x"}}, TypeError, "`scale` .* a finite number, but is 'x'"),
        ("ties", {"scale": {"block": -1.0}}, ValueError, "`scale` must be at least 0, but is -1.0"),
        ("ties", {"scale": [0.1, "x"]}, TypeError, "finite number, but is \\[0.1, 'x'\\]"),
        ("ties", {"scale": [0.1]}, TypeError, "finite number, but is \\[0.1\\]"),
        ("lines", {"beta": {"*": 0.5}}, ValueError, "'lines' treats the model as a whole"),
        ("git_rebasin", {"seed": {"*": 1}}, ValueError, "'git_rebasin' treats the model as a"),
        ("karcher", {"iterations": [1, 5]}, TypeError, "a whole number, but is \\[1, 5\\]"),
    ],
)
def test_bad_values_by_pattern_are_refused_before_anything_is_read(
    tiny_experts, headers_of, method, config, error, message
):
    unread = headers_of(tiny_experts)
    with pytest.raises(error, match=message):
        merge(unread, method, config=config)
    with pytest.raises(error, match=message):
        merge_many(unread, method, [config])


def test_what_is_not_selected_stays_the_bases_and_has_no_say(tiny_experts):
    some = select(tiny_experts, include=["block", "token"], exclude=["block.bias"])
    assert some.merged_names() == ["block.weight", "token"]
    for method in ("task_arithmetic", "ties", "emr", "git_rebasin"):
        merged = merge(some, method)
        assert merged.facts["kept"] == ["block.bias", "logit_scale", "norm.weight", "stem.weight"]
        for name in merged.facts["kept"]:
            assert torch.equal(merged.shared[name], tiny_experts.base[name]), (method, name)
    # The threshold of TIES is that of the tensors that are merged.
    whole = merge(tiny_experts, "ties")
    assert not torch.equal(merge(some, "ties").shared["block.weight"], whole.shared["block.weight"])


def test_a_selection_of_nothing_is_refused(tiny_experts):
    with pytest.raises(ValueError, match="must leave a tensor to merge, but leave none of 6"):
        select(tiny_experts, exclude=["*"])
    with pytest.raises(ValueError, match=r"`exclude` must have patterns .* Near it: token"):
        select(tiny_experts, exclude=["tokens"])
    with pytest.raises(ValueError, match="'running_mean' matches none"):
        select(tiny_experts, include=["running_mean"])
