"""What every registered merge method promises, plug-ins of other distributions included."""

import inspect
import json
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args
from unittest import mock

import pytest
import torch

from mergekit_lit.core.calibration import Batch, Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import DataUse, Form
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import engine
from mergekit_lit.merging.configuration import accepts, parameters
from mergekit_lit.models.capture import network


class TinyNet(torch.nn.Module):
    """A network whose tensors are those of the tiny experts."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.norm.register_parameter("bias", None)
        self.block = torch.nn.Linear(5, 7)
        self.token = torch.nn.Parameter(torch.zeros(1, 1))
        self.logit_scale = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        pooled = self.norm(self.stem(x.to(self.stem.weight.dtype))).relu().mean((2, 3))
        token = self.token.expand(len(x), 1)
        return self.logit_scale * self.block(torch.cat([pooled, token], dim=1))


NETWORK = TinyNet()


class TinySamples:
    """Twelve random images, labels included."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(12, 3, 5, 5, generator=draw, dtype=torch.float64)

    def __len__(self):
        return 12

    def take(self, positions):
        return Batch(self.inputs[positions], positions % 2)


def tiny_calibration(experts: Experts, split: str) -> Calibration:
    """Return images and heads that follow the experts' travels, whatever their order and names."""
    seeds = {
        name: int(card.travel) for name, card in zip(experts.names, experts.cards, strict=True)
    }
    heads = {
        name: torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for name, seed in seeds.items()
    }
    return Calibration(
        split=split,
        samples={name: TinySamples(seed) for name, seed in seeds.items()},
        expert=network(NETWORK),
        merged=network(NETWORK, batch_statistics=True),
        logits=lambda task, features: features @ heads[task].to(features.dtype).T,
    )


def merge(experts: Experts, method: str, **options: Any) -> Merged:
    """Merge as the engine does, with images for the methods that look at some."""
    split = MERGE_METHODS.get(method).facts["data"]
    if split in get_args(DataSplit):
        options = {"calibration": tiny_calibration(experts, split), **options}
        if "steps" in parameters(MERGE_METHODS.get(method).function):
            options["config"] = {"steps": 3, **options.get("config", {})}
    return engine.merge(experts, method, **options)


class Make:
    """Makes tiny experts, as many as asked for or as the method can take."""

    def __init__(self, method: str, make_experts: Callable[..., Experts]) -> None:
        self.any = make_experts
        self.low, self.high = MERGE_METHODS.get(method).facts.get("experts", (1, None))

    def __call__(self, count: int = 3, **options: Any) -> Experts:
        fitting = max(self.low, count if self.high is None else min(count, self.high))
        return self.any(fitting, **options)


def same(left: Merged, right: Merged) -> bool:
    return left.shared.keys() == right.shared.keys() and all(
        torch.equal(tensor, right.shared[name]) for name, tensor in left.shared.items()
    )


def check_declares_facts(method: str, make: Make) -> None:
    entry = MERGE_METHODS.get(method)
    assert entry.facts["form"] in get_args(Form)
    assert entry.facts["data"] in get_args(DataUse)
    assert entry.facts["family"]
    assert entry.facts["source"]
    assert "Source:" in (entry.function.__doc__ or "")
    assert entry.summary.endswith(".")
    low, high = entry.facts.get("experts", (1, None))
    assert 1 <= low <= len(make()) <= (high or 3)


def check_a_number_of_experts_it_cannot_take_is_refused(method: str, make: Make) -> None:
    low, high = MERGE_METHODS.get(method).facts.get("experts", (1, None))
    too_many = [] if high is None else [high + 1]
    for count in [low - 1] * (low > 1) + too_many:
        with pytest.raises(ValueError, match=f"{method!r} takes .* experts, but got {count} "):
            merge(make.any(count), method)


def check_search_ranges_belong_to_parameters(method: str, make: Make) -> None:
    entry = MERGE_METHODS.get(method)
    known = parameters(entry.function)
    for name, (low, high) in entry.facts.get("search", {}).items():
        assert low < high
        default = known[name].default
        assert default is inspect.Parameter.empty or low <= default <= high
        for end in (low, high):
            merged = merge(make(), method, config={name: end})
            assert all_finite(merged)


def all_finite(merged: Merged) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in merged.shared.values())


def check_keeps_names_shapes_dtypes(method: str, make: Make) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        experts = make(dtype=dtype)
        merged = merge(experts, method)
        assert list(merged.shared) == list(experts.base)
        for name, tensor in experts.base.items():
            assert merged.shared[name].shape == tensor.shape
            assert merged.shared[name].dtype == tensor.dtype
        assert all_finite(merged)


def check_takes_half_precision_experts_of_a_float32_base(method: str, make: Make) -> None:
    experts = make(dtype=torch.float32)
    half = [
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in tuned.items()}
        for tuned in experts.tuned
    ]
    merged = merge(replace(experts, tuned=half), method)
    assert merged.shared["stem.weight"].dtype == torch.float32
    assert all_finite(merged)


def check_leaves_inputs_and_random_state_alone(method: str, make: Make) -> None:
    experts, untouched = make(), make()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    merge(experts, method, batch_norm="average")
    assert torch.equal(torch.get_rng_state(), state)
    for params, reference in zip(
        (experts.base, *experts.tuned, *experts.heads),
        (untouched.base, *untouched.tuned, *untouched.heads),
        strict=True,
    ):
        assert all(torch.equal(tensor, reference[name]) for name, tensor in params.items())


def check_untuned_experts_give_the_base_back(method: str, make: Make) -> None:
    experts = make()
    merged = merge(replace(experts, tuned=[experts.base] * len(experts)), method)
    for name, tensor in experts.base.items():
        assert torch.equal(merged.shared[name], tensor), name


def check_moves_where_experts_moved(method: str, make: Make) -> None:
    experts = make()
    merged = merge(experts, method)
    assert any(
        not torch.equal(merged.shared[name], experts.base[name]) for name in experts.merged_names()
    )


def check_integers_and_statistics_stay_the_bases(method: str, make: Make) -> None:
    experts = make()
    merged = merge(experts, method)
    for name in set(experts.base) - set(experts.merged_names()):
        assert torch.equal(merged.shared[name], experts.base[name]), name


def check_order_of_experts(method: str, make: Make) -> None:
    declared = MERGE_METHODS.get(method).facts.get("order")
    if declared is not None:
        assert len(declared) > 10  # a reason
        return
    experts = make()
    turned = replace(
        experts,
        tuned=experts.tuned[::-1],
        cards=experts.cards[::-1],
        heads=experts.heads[::-1],
        names=experts.names[::-1],
    )
    merged, other = merge(experts, method), merge(turned, method)
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(other.shared[name], tensor, rtol=1e-9, atol=1e-12)


def check_second_call_gives_the_same_bytes(method: str, make: Make) -> None:
    assert same(merge(make(), method, seed=3), merge(make(), method, seed=3))


def check_names_of_tasks_do_not_matter(method: str, make: Make) -> None:
    experts = make()
    names = ["x", "y", "z"][: len(experts)]
    cards = [replace(card, task=name) for card, name in zip(experts.cards, names, strict=True)]
    renamed = replace(experts, names=names, cards=cards)
    assert same(merge(experts, method), merge(renamed, method))
    assert merge(renamed, method).tasks == tuple(names)


def check_one_expert_and_many(method: str, make: Make) -> None:
    for count in (1, 2, 9):
        experts = make(count)
        merged = merge(experts, method)
        assert all_finite(merged)
        assert len(merged.tasks) == len(experts)


def check_every_task_has_a_whole_model(method: str, make: Make) -> None:
    experts = make(dtype=torch.float32)
    merged = merge(experts, method)
    for task in merged.tasks:
        params = merged.for_task(task)
        assert list(params) == list(experts.base)
        for name, tensor in experts.base.items():
            assert params[name].dtype == tensor.dtype
            assert params[name].shape == tensor.shape
            assert bool(torch.isfinite(params[name]).all())


def check_missing_images_are_refused(method: str, make: Make) -> None:
    split = MERGE_METHODS.get(method).facts["data"]
    if split not in get_args(DataSplit):
        return
    experts = make()
    message = f"{method!r} looks at {split} images of every task, but got none. Name the suite"
    with pytest.raises(ValueError, match=message):
        merge(experts, method, calibration=None)
    given = tiny_calibration(experts, split)
    other = replace(given, split="val" if split != "val" else "train")
    with pytest.raises(ValueError, match=f"looks at {split} images, but got {other.split} images"):
        merge(experts, method, calibration=other)
    without = {name: given.samples[name] for name in experts.names[1:]}
    with pytest.raises(ValueError, match=f"every task, but {experts.names[0]!r} has none"):
        merge(experts, method, calibration=replace(given, samples=without))


def check_facts_are_json_and_whole(method: str, make: Make) -> None:
    experts = make()
    facts = merge(experts, method, seed=4).facts
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert set(facts["config"]) == set(parameters(MERGE_METHODS.get(method).function))
    assert (facts["method"], facts["tasks"], facts["seed"]) == (method, list(experts.names), 4)
    assert (facts["base"], facts["base_hash"]) == (experts.base_name, experts.base_hash)
    assert (facts["backbone"], facts["image_size"]) == ("tiny", 8)
    linear = MERGE_METHODS.get(method).facts["form"] == "linear"
    assert (facts["coefficients"] is not None) == linear
    assert not linear or len(facts["coefficients"]) == len(experts)
    assert facts["veneers"] == []


def check_bad_values_are_refused(method: str, make: Make) -> None:
    experts = make()
    known = parameters(MERGE_METHODS.get(method).function)
    with pytest.raises(KeyError, match="no_such_parameter"):
        merge(experts, method, config={"no_such_parameter": 1})
    for name, parameter in known.items():
        for bad in (math.nan, math.inf, "text", object(), {}, [None]):
            if not accepts(parameter.annotation, bad):
                with pytest.raises(TypeError, match=f"`{name}` of {method!r} must be"):
                    merge(experts, method, config={name: bad})
        if name in MERGE_METHODS.get(method).facts.get("search", {}):
            with pytest.raises(ValueError, match=f"`{name}` must"):
                merge(experts, method, config={name: -1})


def check_observers_replace_what_the_method_sees(method: str, make: Make) -> None:
    experts = make()
    merged = merge(experts, method, observers=[Erase()])
    for name, tensor in experts.base.items():
        assert torch.equal(merged.shared[name], tensor), name
    assert same(merge(experts, method, observers=[Watch()]), merge(experts, method))


def check_numbers_that_are_none_are_refused(method: str, make: Make) -> None:
    experts = make(dtype=torch.float32)
    for bad, name in ((math.nan, "block.weight"), (math.inf, "token")):
        spoilt = experts.tuned[0][name].clone()
        spoilt.view(-1)[0] = bad
        tuned = [{**experts.tuned[0], name: spoilt}, *experts.tuned[1:]]
        with pytest.raises(ValueError, match=f"Expert 'task0' must hold finite .* {name!r} has 1"):
            merge(replace(experts, tuned=tuned), method)
        spoilt = {**experts.base, name: torch.full_like(experts.base[name], bad)}
        with pytest.raises(ValueError, match=f"The base must hold finite .* {name!r} has"):
            merge(replace(experts, base=spoilt), method)


def check_experts_that_do_not_fit_the_base_are_refused(method: str, make: Make) -> None:
    experts = make()
    first = experts.tuned[0]
    for change, message in (
        ({"neck": torch.ones(2)}, "differ in 1 parameter names, first 'neck'"),
        ({"block.weight": first["block.weight"][:1]}, r"shapes of 1 .* \(1, 5\) and \(7, 5\)"),
        ({"token": first["token"].int()}, "kinds of numbers, but 'token' is of torch.int32"),
    ):
        other = replace(experts, tuned=[{**first, **change}, *experts.tuned[1:]])
        with pytest.raises(ValueError, match=f"Expert 'task0' .*{message}"):
            merge(other, method)
    counters = {"norm.num_batches_tracked": experts.base["norm.num_batches_tracked"]}
    bare = replace(experts, base=counters, tuned=[counters] * len(experts))
    with pytest.raises(ValueError, match="base must have floating-point tensors to merge"):
        merge(bare, method)


def check_idle_and_low_rank_experts_have_a_result(method: str, make: Make) -> None:
    """An expert that did not move; and experts of LoRA: one layer moved, by a matrix of rank 1."""
    experts = make(dtype=torch.float32)
    assert all_finite(merge(replace(experts, tuned=[experts.base, *experts.tuned[1:]]), method))
    tuned = [
        {**experts.base, "block.weight": experts.base["block.weight"] + torch.outer(u, u[:5])}
        for u in torch.randn(len(experts), 7, generator=torch.Generator().manual_seed(0))
    ]
    merged = merge(replace(experts, tuned=tuned), method)
    assert all_finite(merged)
    by_tensor = MERGE_METHODS.get(method).facts["form"] in ("linear", "kernel")
    for name in set(experts.base) - {"block.weight"} if by_tensor else ():
        torch.testing.assert_close(merged.shared[name], experts.base[name])


def check_what_is_kept_stays_the_bases(method: str, make: Make) -> None:
    experts = replace(make(), kept=frozenset({"block.bias", "stem.weight"}))
    merged = merge(experts, method)
    assert merged.facts["kept"] == ["block.bias", "stem.weight"]
    for name in experts.kept:
        assert torch.equal(merged.shared[name], experts.base[name])


def check_homogeneous_steps_are_multiples_of_one_direction(method: str, make: Make) -> None:
    entry = MERGE_METHODS.get(method)
    if not entry.facts.get("homogeneous"):
        return
    assert entry.facts["form"] in ("linear", "kernel")
    experts, config = make(), {"scale": 0.7}
    by_engine = merge(experts, method, config=config)
    # Undeclared, the method itself is asked for its step at that scale.
    undeclared = replace(entry, facts={**entry.facts, "homogeneous": False})
    with mock.patch.dict(MERGE_METHODS._entries, {method: undeclared}):
        by_method = merge(experts, method, config=config)
    for name, tensor in by_method.shared.items():
        torch.testing.assert_close(by_engine.shared[name], tensor, rtol=1e-12, atol=1e-14)


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
def test_contract(check, method, make_experts):
    check(method, Make(method, make_experts))


PLUG_IN = '''
    from mergekit_lit.core.registry import MERGE_METHODS


    def count(pairs):
        return {"tensors": sum(1 for _ in pairs)}


    @MERGE_METHODS.add(
        form="kernel",
        family="sparsifying",
        data="none",
        source="Nobody 2026, eq. 1",
        search={"scale": (0.0, 1.0)},
        prepare=count,
    )
    def largest_of_all(tensor, *, scale: float = 0.5):
        """Take each entry from the expert that moved it most.

        Args:
            tensor: deltas (T, *s).
            scale: length of the step, at least 0.

        Source: Nobody 2026, eq. 1.
        """
        if scale < 0:
            raise ValueError(f"`scale` must be at least 0, but is {scale}.")
        assert tensor.stats["tensors"] in (4, 6)  # some are kept in one of the checks
        order = tensor.deltas.abs().argmax(dim=0, keepdim=True)
        return scale * tensor.deltas.gather(0, order)[0]
'''


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a second distribution whose entry point registers `largest_of_all`."""
    (tmp_path / "merge_plug_in.py").write_text(textwrap.dedent(PLUG_IN))
    facts = tmp_path / "merge_plug_in-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: merge-plug-in\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[mergekit_lit.merge_methods]\nlargest = merge_plug_in\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # As in a new process: nothing is looked up yet. What the plug-in adds goes when the test ends.
    monkeypatch.setattr(MERGE_METHODS, "_loaded", False)
    monkeypatch.setattr(MERGE_METHODS, "_entries", dict(MERGE_METHODS._entries))
    yield "largest_of_all"
    sys.modules.pop("merge_plug_in", None)


def test_plug_in_of_another_distribution_keeps_the_contract(plug_in, make_experts):
    assert plug_in in MERGE_METHODS.names()
    for check in CHECKS:
        check(plug_in, Make(plug_in, make_experts))


def test_plug_in_of_another_distribution_stands_in_the_command(plug_in, capsys):
    from mergekit_lit.cli import main

    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[plug_in]["source"] == "Nobody 2026, eq. 1"
    assert rows[plug_in]["parameters"][0]["help"] == "length of the step, at least 0."
