"""The engine: what it does with each form, BatchNorm, precision, observers and bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lit.core.experts import Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.merging.steps import weighted_sum


@pytest.fixture
def methods(monkeypatch):
    """Return the registry with additions that go when the test ends."""
    MERGE_METHODS.names()
    monkeypatch.setattr(MERGE_METHODS, "_entries", dict(MERGE_METHODS._entries))
    return MERGE_METHODS


class Scribe:
    """Write down what an observer is told; replace deltas by `factor` times them."""

    def __init__(self, factor: float | None = None) -> None:
        self.factor = factor
        self.told: list[object] = []

    def on_merge_start(self, experts, method, config):
        self.told.append(("start", method, dict(config)))

    def on_merge_tensor(self, name, deltas):
        self.told.append((name, tuple(deltas.shape)))
        return None if self.factor is None else self.factor * deltas

    def on_merge_end(self, experts, merged):
        self.told.append(("end", merged.facts["method"]))


def assert_close(left, right):
    for name, tensor in left.shared.items():
        torch.testing.assert_close(right.shared[name], tensor, rtol=1e-12, atol=1e-12)


def test_observers_see_start_each_tensor_once_and_end(tiny_experts):
    scribe = Scribe()
    merge(tiny_experts, "task_arithmetic", observers=[scribe])
    names = tiny_experts.merged_names()
    shapes = [(name, (3, *tiny_experts.base[name].shape)) for name in names]
    assert scribe.told == [
        ("start", "task_arithmetic", {"scale": 0.3}),
        *shapes,
        ("end", "task_arithmetic"),
    ]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_replaced_deltas_reach_the_method_and_the_next_observer(tiny_experts, method):
    doubled = merge(tiny_experts, method, config={"scale": 0.2}, observers=[Scribe(4), Scribe(0.5)])
    assert_close(merge(tiny_experts, method, config={"scale": 0.4}), doubled)


def test_observer_of_wrong_shape_is_named(tiny_experts):
    class Cutter(Scribe):
        def on_merge_tensor(self, name, deltas):
            return deltas[:1]

    with pytest.raises(ValueError, match=r"Cutter must return deltas of 'block.bias' of shape"):
        merge(tiny_experts, "average", observers=[Cutter()])


def test_statistics_of_the_base_by_default(tiny_experts):
    merged = merge(tiny_experts, "average")
    assert torch.equal(merged.shared["norm.running_mean"], tiny_experts.base["norm.running_mean"])
    assert merged.facts["batch_norm"] == "base"


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "tsv_m"])
def test_averaged_statistics_do_not_depend_on_the_method(tiny_experts, method):
    merged = merge(tiny_experts, method, batch_norm="average")
    for name in ("norm.running_mean", "norm.running_var"):
        expected = np.mean([tuned[name].numpy() for tuned in tiny_experts.tuned], axis=0)
        np.testing.assert_allclose(merged.shared[name].numpy(), expected, rtol=1e-12)
    assert int(merged.shared["norm.num_batches_tracked"]) == 7


def test_averaged_variances_are_never_negative(tiny_experts):
    tuned = [{**t, "norm.running_var": t["norm.running_var"] - 5} for t in tiny_experts.tuned]
    merged = merge(replace(tiny_experts, tuned=tuned), "average", batch_norm="average")
    assert float(merged.shared["norm.running_var"].min()) == 0


def test_integers_that_are_no_counters_are_the_bases(make_experts):
    index, two = {"index": torch.arange(4)}, make_experts(2)
    experts = replace(
        two,
        base=two.base | index,
        tuned=[{**tuned, "index": torch.arange(4) + 9} for tuned in two.tuned],
        structure=two.structure | {"index": TensorInfo("other", 0, "stem")},
    )
    for method in [m.name for m in MERGE_METHODS if m.facts["data"] in ("none", "cards")]:
        assert torch.equal(merge(experts, method).shared["index"], index["index"])


def test_twenty_bf16_experts_are_averaged_as_well_as_bf16_can_be(make_experts):
    """Summing in bf16 loses several bits; the engine sums in float32 and rounds once."""
    experts = make_experts(20, dtype=torch.bfloat16)
    merged = merge(experts, "average").shared
    for name in experts.merged_names():
        exact = torch.stack([tuned[name].double() for tuned in experts.tuned]).mean(0)
        best = (exact.to(torch.bfloat16).double() - exact).abs()
        ulp = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
        error = (merged[name].double() - exact).abs()
        assert bool((error <= best + 1e-3 * ulp).all()), name


def test_weighted_sum_is_differentiable_in_the_coefficients():
    deltas = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    coefficients = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    weighted_sum(coefficients, deltas).sum().backward()
    assert coefficients.grad is not None
    torch.testing.assert_close(coefficients.grad, deltas.sum((1, 2)).double())


def test_heads_are_kept_per_task(tiny_experts):
    merged = merge(tiny_experts, "average")
    assert merged.tasks == ("task0", "task1", "task2")
    assert merged.heads["task1"] is tiny_experts.heads[1]


def test_whole_form_gets_statistics_heads_and_facts(tiny_experts, methods):
    @methods.add(form="whole", family="test", data="none", source="none")
    def last(experts, *, place: int = -1):
        """Return one expert."""
        return Merged(dict(experts.tuned[place]), experts.structure, facts={"place": place})

    merged = merge(tiny_experts, "last", batch_norm="average")
    assert torch.equal(merged.shared["block.weight"], tiny_experts.tuned[2]["block.weight"])
    assert int(merged.shared["norm.num_batches_tracked"]) == 7
    assert merged.facts["place"] == -1
    assert merged.facts["config"] == {"place": -1}
    assert merged.tasks == ("task0", "task1", "task2")


def test_kernel_gets_what_prepare_found(tiny_experts, methods):
    def largest(pairs, *, share):
        largest = max(float(deltas.abs().max()) for _, deltas in pairs)
        return {"bound": share * largest, "share": share}

    @methods.add(form="kernel", family="test", data="none", source="none", prepare=largest)
    def clipped(tensor, *, share: float = 0.5, scale: float = 1.0):
        """Clip."""
        assert tensor.stats["share"] == share
        bound = tensor.stats["bound"]
        return scale * tensor.deltas.clamp(-bound, bound).mean(0)

    merged = merge(tiny_experts, "clipped")
    everything = torch.cat(
        [tiny_experts.deltas(name).flatten() for name in tiny_experts.merged_names()]
    )
    bound = float(everything.abs().max()) / 2
    deltas = tiny_experts.deltas("block.weight").clamp(-bound, bound).mean(0)
    expected = tiny_experts.base["block.weight"] + deltas
    torch.testing.assert_close(merged.shared["block.weight"], expected)


def bad_form(experts):
    """Do nothing."""


def bad_count(experts):
    """Return one coefficient too few."""
    return torch.ones(len(experts) - 1)


def bad_shape(tensor):
    """Return the deltas themselves."""
    return tensor.deltas


def bad_numbers(experts):
    """Return infinite coefficients."""
    return torch.full((len(experts),), float("inf"))


def bad_names(experts):
    """Return half a model."""
    return Merged({"block.weight": experts.base["block.weight"]}, experts.structure)


@pytest.mark.parametrize(
    ("function", "form", "message"),
    [
        (bad_form, "kernal", "No form .* named 'kernal'. Did you mean 'kernel'?"),
        (bad_count, "linear", r"'bad_count' must return 3 coefficients, .* shape \(2,\)"),
        (bad_shape, "kernel", r"step of 'block.bias' must have shape \(7,\), but has \(3, 7\)"),
        (bad_numbers, "linear", "result of 'bad_numbers' must be finite, but"),
        (bad_names, "whole", "result of 'bad_names' and the base differ in 5 parameter names"),
    ],
)
def test_a_method_that_breaks_its_promise_is_named(tiny_experts, methods, function, form, message):
    methods.add(form=form, family="test", data="none", source="none")(function)
    with pytest.raises(ValueError, match=message):
        merge(tiny_experts, function.__name__)


def test_a_result_beyond_half_precision_is_refused(make_experts):
    experts = make_experts(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must fit into torch.float16, .* 'stem.weight' holds"):
        merge(experts, "task_arithmetic", config={"scale": 1e7})


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("tiess", {}, KeyError, "No merge method named 'tiess'. Did you mean 'ties'?"),
        (
            "average",
            {"batch_norm": "avrage"},
            ValueError,
            "No BatchNorm policy named 'avrage'. Did you mean 'average'?",
        ),
        (
            "average",
            {"batch_norm": "recalibrate"},
            ValueError,
            "'recalibrate' needs images, which `merge` has not",
        ),
        ("average", {"config": {"scale": 1}}, KeyError, "'average' takes no parameters"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_observed(
    tiny_experts, method, options, error, message
):
    scribe = Scribe()
    with pytest.raises(error) as caught:
        merge(tiny_experts, method, observers=[scribe], **options)
    assert message in caught.value.args[0]
    assert scribe.told == []


ELEMENTWISE = [entry.name for entry in MERGE_METHODS if entry.facts.get("elementwise")]


@pytest.mark.parametrize("method", sorted({*ELEMENTWISE, "average", "metagpt", "git_rebasin"}))
def test_blocks_of_entries_give_what_whole_tensors_give(method, make_experts, monkeypatch):
    made = make_experts(3, dtype=torch.float32)
    whole = merge(made, method, seed=3)
    monkeypatch.setattr("mergekit_lit.core.experts.BLOCK", 4)
    parts = merge(made, method, seed=3)
    for name, tensor in whole.shared.items():
        step = tensor - made.base[name]
        if method == "dare" and tensor.numel() > 4 and name in made.merged_names():
            # Draws are keyed by block.
            assert not torch.equal(parts.shared[name], tensor)
        else:
            torch.testing.assert_close(parts.shared[name] - made.base[name], step)


def test_a_kernel_that_needs_one_expert_at_a_time_holds_one(make_experts, methods):
    alive: list[int] = []

    def longest(tensor):
        """Take the longest delta."""
        chosen = tensor.each[0]
        for delta in tensor.each:
            chosen = max(chosen, delta, key=lambda d: float(d.norm()))
        alive.append("deltas" in vars(tensor))
        return chosen

    methods.add(form="kernel", data="none", family="x", source="x")(longest)
    merge(make_experts(3, dtype=torch.float32), "longest")
    assert alive
    assert not any(alive)
