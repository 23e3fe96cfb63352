"""Number types: in which a merge computes, and in which its result is kept."""

import pytest
import torch

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import merge

DATA_FREE = [m.name for m in MERGE_METHODS if m.facts["data"] in ("none", "cards")]


def exact(make_experts, method, count, **options):
    """Return the merge of the same numbers, all held in float64."""
    experts = make_experts(count, dtype=torch.float32)
    experts = type(experts)(
        **vars(experts)
        | {
            "base": doubled(experts.base),
            "tuned": [doubled(tuned) for tuned in experts.tuned],
        }
    )
    return merge(experts, method, **options)


def doubled(params):
    return {name: t.double() if t.is_floating_point() else t for name, t in params.items()}


@pytest.mark.parametrize("method", [m for m in DATA_FREE if m not in ("dare", "della")])
def test_float64_is_the_merge_of_experts_in_float64(make_experts, method):
    # Random draws are made in the number type of the deltas: of the others, all must agree.
    count = MERGE_METHODS.get(method).facts.get("experts", (1, None))[1] or 3
    merged = merge(make_experts(count, dtype=torch.float32), method, dtype="float64")
    reference = exact(make_experts, method, count)
    for name, tensor in reference.shared.items():
        kept = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(merged.shared[name], kept), name
    assert (merged.facts["dtype"], merged.facts["out_dtype"]) == ("float64", "base")


@pytest.mark.parametrize("method", ["average", "ties", "emr", "git_rebasin", "lines"])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_is_rounded_once(make_experts, method, kept):
    experts = make_experts(3, dtype=torch.bfloat16)
    name = str(kept).removeprefix("torch.")
    merged = merge(experts, method, out_dtype=name, batch_norm="average")
    full = merge(experts, method, out_dtype="float32", batch_norm="average")
    assert merged.facts["out_dtype"] == name
    for task in merged.tasks:
        for tensor in merged.for_task(task).values():
            assert tensor.dtype == (kept if tensor.is_floating_point() else torch.int64)
    for key, tensor in full.shared.items():
        assert torch.equal(merged.shared[key], tensor.to(merged.shared[key].dtype))
    if method in ("average", "lines"):  # more than the base's 8 bits were kept
        weight = full.shared["block.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())


def test_what_is_not_merged_keeps_all_digits_whatever_the_computation(make_experts):
    experts = make_experts(2, dtype=torch.float64)
    merged = merge(experts, "average", dtype="float32")
    assert torch.equal(merged.shared["norm.running_var"], experts.base["norm.running_var"])
    assert merged.shared["block.weight"].dtype == torch.float64


def test_what_does_not_fit_is_one_clear_error(make_experts):
    experts = make_experts(2, dtype=torch.float32)
    huge = {"scale": 1e6}
    merge(experts, "task_arithmetic", config=huge, out_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"fit into torch.float16, .* but '[\w.]+' holds .*e\+05"):
        merge(experts, "task_arithmetic", config=huge, out_dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "No `dtype` of computation named 'float16'"),
        ({"out_dtype": "bf16"}, "No `out_dtype` named 'bf16'. Did you mean 'bfloat16'"),
    ],
)
def test_unknown_number_types(tiny_experts, options, message):
    with pytest.raises(KeyError, match=message):
        merge(tiny_experts, "average", **options)
