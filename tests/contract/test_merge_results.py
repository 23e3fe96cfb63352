"""What comes of every registered merge method, plug-ins of other distributions included."""

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.forms import has_adapters, is_per_task


def same(left: Merged, right: Merged) -> bool:
    return left.shared.keys() == right.shared.keys() and all(
        torch.equal(tensor, right.shared[name]) for name, tensor in left.shared.items()
    )


def check_keeps_names_shapes_dtypes(of):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        experts = of(dtype=dtype)
        merged = of.finite(experts)
        assert list(merged.shared) == list(experts.base)
        for name, tensor in experts.base.items():
            assert merged.shared[name].shape == tensor.shape
            assert merged.shared[name].dtype == tensor.dtype


def check_takes_half_precision_experts_of_a_float32_base(of):
    experts = of(dtype=torch.float32)
    half = [
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in tuned.items()}
        for tuned in experts.tuned
    ]
    merged = of.finite(replace(experts, tuned=half))
    assert merged.shared["stem.weight"].dtype == torch.float32


def check_leaves_inputs_and_random_state_alone(of):
    experts, untouched = of(), of()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    of.merge(experts, batch_norm="average")
    assert torch.equal(torch.get_rng_state(), state)
    for params, reference in zip(
        (experts.base, *experts.tuned, *experts.heads),
        (untouched.base, *untouched.tuned, *untouched.heads),
        strict=True,
    ):
        assert all(torch.equal(tensor, reference[name]) for name, tensor in params.items())


def check_untuned_experts_give_the_base_back(of):
    experts = of()
    merged = of.merge(replace(experts, tuned=[experts.base] * len(experts)))
    for name, tensor in experts.base.items():
        assert torch.equal(merged.shared[name], tensor), name


def check_moves_where_experts_moved(of):
    experts = of()
    merged = of.merge(experts)
    assert any(
        not torch.equal(merged.shared[name], experts.base[name]) for name in experts.merged_names()
    )


def check_integers_and_statistics_stay_the_bases(of):
    experts = of()
    merged = of.merge(experts)
    for name in set(experts.base) - set(experts.merged_names()):
        assert torch.equal(merged.shared[name], experts.base[name]), name


def check_order_of_experts(of):
    declared = of.entry.facts.get("order")
    if declared is not None:
        assert len(declared) > 10  # a reason
        return
    experts = of()
    turned = replace(
        experts,
        tuned=experts.tuned[::-1],
        cards=experts.cards[::-1],
        heads=experts.heads[::-1],
        names=experts.names[::-1],
    )
    merged, other = of.merge(experts), of.merge(turned)
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(other.shared[name], tensor, rtol=1e-9, atol=1e-12)


def check_second_call_gives_the_same_bytes(of):
    assert same(of.merge(of(), seed=3), of.merge(of(), seed=3))


def check_looks_at_images_on_one_thread(of):
    if of.split is None:
        return
    experts = of()
    calibration = of.calibration(experts)
    with of.threads(3):
        of.merge(experts, calibration=calibration)
        assert torch.get_num_threads() == 3
    assert all(samples.threads == {1} for samples in calibration.samples.values())


def check_names_of_tasks_do_not_matter(of):
    experts = of()
    names = ["x", "y", "z"][: len(experts)]
    cards = [replace(card, task=name) for card, name in zip(experts.cards, names, strict=True)]
    renamed = replace(experts, names=names, cards=cards)
    assert same(of.merge(experts), of.merge(renamed))
    assert of.merge(renamed).tasks == tuple(names)


def check_one_expert_and_many(of):
    for count in (1, 2, 9):
        experts = of(count)
        assert len(of.finite(experts).tasks) == len(experts)


def check_every_task_has_a_whole_model(of):
    experts = of(dtype=torch.float32)
    merged = of.merge(experts)
    for task in merged.tasks:
        params = merged.for_task(task)
        assert list(params) == list(experts.base)
        for name, tensor in experts.base.items():
            assert params[name].dtype == tensor.dtype
            assert params[name].shape == tensor.shape


def check_facts_are_json_and_whole(of):
    experts = of()
    facts = of.merge(experts, seed=4).facts
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert set(facts["config"]) == set(of.parameters)
    assert (facts["method"], facts["tasks"], facts["seed"]) == (of.method, list(experts.names), 4)
    assert (facts["base"], facts["base_hash"]) == (experts.base_name, experts.base_hash)
    assert (facts["backbone"], facts["image_size"]) == ("tiny", 8)
    linear = of.entry.facts["form"] == "linear"
    assert (facts["coefficients"] is not None) == linear
    assert not linear or len(facts["coefficients"]) == len(experts)
    assert facts["veneers"] == []


def check_observers_replace_what_the_method_sees(of):
    experts = of()
    merged = of.merge(experts, observers=[Erase()])
    for name, tensor in experts.base.items():
        assert torch.equal(merged.shared[name], tensor), name
    assert same(of.merge(experts, observers=[Watch()]), of.merge(experts))


def check_idle_and_low_rank_experts_have_a_result(of):
    """An expert that did not move; and experts of LoRA: one layer moved, by a matrix of rank 1."""
    experts = of(dtype=torch.float32)
    of.finite(replace(experts, tuned=[experts.base, *experts.tuned[1:]]))
    tuned = [
        {**experts.base, "block.weight": experts.base["block.weight"] + torch.outer(u, u[:5])}
        for u in torch.randn(len(experts), 7, generator=torch.Generator().manual_seed(0))
    ]
    merged = of.finite(replace(experts, tuned=tuned))
    by_tensor = of.entry.facts["form"] in ("linear", "kernel")
    for name in set(experts.base) - {"block.weight"} if by_tensor else ():
        torch.testing.assert_close(merged.shared[name], experts.base[name])


def check_experts_of_other_bases_have_a_result(of):
    """Let in by `allow_different_base`, and far from the base: their deltas outweigh it."""
    experts = of(dtype=torch.float32, size=30.0)
    cards = [replace(card, base_hash=str(t)) for t, card in enumerate(experts.cards)]
    of.finite(replace(experts, cards=cards))


def check_weights_of_whole_numbers_or_of_none_stay_the_bases(of):
    """A quantised layer, which differs in the experts, and one without units."""
    if of.split:  # the network of its images has no such layers
        return
    experts, odd = of(), {"whole": torch.arange(6).reshape(2, 3), "none": torch.zeros(0, 3)}
    info = experts.structure["block.weight"]
    tuned = [{**own, **odd, "whole": odd["whole"] + t} for t, own in enumerate(experts.tuned)]
    structure = {**experts.structure, **{name: replace(info, axes=()) for name in odd}}
    experts = replace(experts, base={**experts.base, **odd}, tuned=tuned, structure=structure)
    merged = of.finite(experts)
    assert all(torch.equal(merged.shared[name], tensor) for name, tensor in odd.items())


def check_what_is_kept_stays_the_bases(of):
    experts = replace(of(), kept=frozenset({"block.bias", "stem.weight"}))
    merged = of.merge(experts)
    assert merged.facts["kept"] == ["block.bias", "stem.weight"]
    for name in experts.kept:
        assert torch.equal(merged.shared[name], experts.base[name])


def check_homogeneous_steps_are_multiples_of_one_direction(of):
    entry = of.entry
    if not entry.facts.get("homogeneous"):
        return
    assert entry.facts["form"] in ("linear", "kernel")
    experts, config = of(), {"scale": 0.7}
    by_engine = of.merge(experts, config=config)
    # Undeclared, the method itself is asked for its step at that scale.
    undeclared = replace(entry, facts={**entry.facts, "homogeneous": False})
    with mock.patch.dict(MERGE_METHODS._entries, {of.method: undeclared}):
        by_method = of.merge(experts, config=config)
    for name, tensor in by_method.shared.items():
        torch.testing.assert_close(by_engine.shared[name], tensor, rtol=1e-12, atol=1e-14)


def check_a_model_for_each_task_is_declared(of):
    merged = of.merge(of())
    own = bool(merged.masks or merged.own)
    assert is_per_task(of.entry, merged.facts["config"]) == own
    assert has_adapters(of.entry) == bool(merged.adapters)


class Watch:
    """See everything, change nothing."""

    def on_merge_start(self, experts: Experts, method: str, config: Any) -> None:
        self.seen: list[str] = []

    def on_merge_tensor(self, name: str, deltas: torch.Tensor) -> torch.Tensor | None:
        self.seen.append(name)
        return None

    def on_merge_end(self, experts: Experts, merged: Merged) -> None:
        assert self.seen == experts.merged_names()


class Erase(Watch):
    """Replace all deltas by zeros."""

    def on_merge_tensor(self, name: str, deltas: torch.Tensor) -> torch.Tensor | None:
        super().on_merge_tensor(name, deltas)
        return torch.zeros_like(deltas)


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("method", MERGE_METHODS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check, method, subject):
    check(subject(method))


def test_a_plug_in_keeps_the_contract(plug_in, subject):
    assert plug_in in MERGE_METHODS.names()
    for check in CHECKS:
        check(subject(plug_in))
