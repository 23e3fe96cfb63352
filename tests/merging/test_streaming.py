"""Merging each tensor when it is asked for: the same bytes, little memory, errors in time."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.expert_files import save_merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.specs import Computed
from mergekit_lit.merging import merge

DATA_FREE = [m.name for m in MERGE_METHODS if m.facts["data"] in ("none", "cards")]


@pytest.mark.parametrize("method", DATA_FREE)
def test_a_streamed_merge_writes_the_same_bytes(tmp_path, make_experts, method):
    count = MERGE_METHODS.get(method).facts.get("experts", (1, None))[1] or 3
    experts = make_experts(count, dtype=torch.bfloat16)
    options = {"batch_norm": "average", "seed": 1, "out_dtype": "float32"}
    save_merged(tmp_path / "whole", merge(experts, method, **options))
    streamed = merge(experts, method, **options, streamed=True)
    by_tensor = MERGE_METHODS.get(method).facts["form"] in ("linear", "kernel")
    assert isinstance(streamed.shared, Computed) == by_tensor
    save_merged(tmp_path / "streamed", streamed)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "streamed").read_bytes()


def test_tensors_are_merged_only_when_asked_for(make_experts, headers_of):
    experts = make_experts(2)
    unread = headers_of(experts)
    tuned = [
        Computed(lazy.specs, {"token": whole["token"]}.__getitem__)
        for lazy, whole in zip(unread.tuned, experts.tuned, strict=True)
    ]
    merged = merge(replace(experts, tuned=tuned), "average", streamed=True)
    assert torch.equal(merged.shared["token"], merge(experts, "average").shared["token"])
    assert list(merged.shared) == list(experts.base)
    with pytest.raises(KeyError, match="block"):
        merged.shared["block.weight"]


def test_a_tensor_that_is_not_finite_leaves_no_file(tmp_path, make_experts):
    experts = make_experts(2)
    huge = {"scale": 1e300}
    tuned = [{**t, "token": t["token"] * 1e300} for t in experts.tuned]
    merged = merge(replace(experts, tuned=tuned), "task_arithmetic", config=huge, streamed=True)
    message = "result of 'task_arithmetic' must be finite, but 'token' is not"
    with pytest.raises(ValueError, match=message):
        save_merged(tmp_path / "m", merged)
    assert not list(tmp_path.iterdir())


def test_veneers_on_the_result_hold_it_all(make_experts):
    merged = merge(make_experts(2), "average", veneers=[("lines", {})], streamed=True)
    assert isinstance(merged.shared, dict)
