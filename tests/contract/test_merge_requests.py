"""What every registered merge method declares and refuses, plug-ins of others included."""

import inspect
import json
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from mergekit_lit.core.merging import DataUse, Form
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import accepts


def check_declares_facts(of):
    entry = of.entry
    assert entry.facts["form"] in get_args(Form)
    assert entry.facts["data"] in get_args(DataUse)
    assert entry.facts["family"]
    assert entry.facts["source"]
    assert "Source:" in (entry.function.__doc__ or "")
    assert entry.summary.endswith(".")
    low, high = entry.facts.get("experts", (1, None))
    assert 1 <= low <= len(of()) <= (high or 3)


def check_a_number_of_experts_it_cannot_take_is_refused(of):
    low, high = of.entry.facts.get("experts", (1, None))
    too_many = [] if high is None else [high + 1]
    for count in [low - 1] * (low > 1) + too_many:
        with pytest.raises(ValueError, match=f"{of.method!r} takes .* experts, but got {count} "):
            of.merge(of.any(count))


def check_search_ranges_belong_to_parameters(of):
    for name, (low, high) in of.entry.facts.get("search", {}).items():
        assert low < high
        default = of.parameters[name].default
        assert default is inspect.Parameter.empty or low <= default <= high
        for end in (low, high):
            of.finite(of(), config={name: end})


def check_missing_images_are_refused(of):
    if of.split is None:
        return
    experts, split = of(), of.split
    message = f"{of.method!r} looks at {split} images of every task, but got none. Name the suite"
    with pytest.raises(ValueError, match=message):
        of.merge(experts, calibration=None)
    given = of.calibration(experts)
    other = replace(given, split="val" if split != "val" else "train")
    with pytest.raises(ValueError, match=f"looks at {split} images, but got {other.split} images"):
        of.merge(experts, calibration=other)
    without = {name: given.samples[name] for name in experts.names[1:]}
    with pytest.raises(ValueError, match=f"every task, but {experts.names[0]!r} has none"):
        of.merge(experts, calibration=replace(given, samples=without))


def check_bad_values_are_refused(of):
    experts = of()
    with pytest.raises(KeyError, match="no_such_parameter"):
        of.merge(experts, config={"no_such_parameter": 1})
    for name, parameter in of.parameters.items():
        for bad in (math.nan, math.inf, "text", object(), {}, [None]):
            if not accepts(parameter.annotation, bad):
                with pytest.raises(TypeError, match=f"`{name}` of {of.method!r} must be"):
                    of.merge(experts, config={name: bad})
        if name in of.entry.facts.get("search", {}):
            with pytest.raises(ValueError, match=f"`{name}` must"):
                of.merge(experts, config={name: -1})


def check_numbers_that_are_none_are_refused(of):
    experts = of(dtype=torch.float32)
    for bad, name in ((math.nan, "block.weight"), (math.inf, "token")):
        spoilt = experts.tuned[0][name].clone()
        spoilt.view(-1)[0] = bad
        tuned = [{**experts.tuned[0], name: spoilt}, *experts.tuned[1:]]
        with pytest.raises(ValueError, match=f"Expert 'task0' must hold finite .* {name!r} has 1"):
            of.merge(replace(experts, tuned=tuned))
        spoilt = {**experts.base, name: torch.full_like(experts.base[name], bad)}
        with pytest.raises(ValueError, match=f"The base must hold finite .* {name!r} has"):
            of.merge(replace(experts, base=spoilt))


def check_experts_that_do_not_fit_the_base_are_refused(of):
    experts = of()
    first = experts.tuned[0]
    for change, message in (
        ({"neck": torch.ones(2)}, "differ in 1 parameter names, first 'neck'"),
        ({"block.weight": first["block.weight"][:1]}, r"shapes of 1 .* \(1, 5\) and \(7, 5\)"),
        ({"token": first["token"].int()}, "kinds of numbers, but 'token' is of torch.int32"),
    ):
        other = replace(experts, tuned=[{**first, **change}, *experts.tuned[1:]])
        with pytest.raises(ValueError, match=f"Expert 'task0' .*{message}"):
            of.merge(other)
    counters = {"norm.num_batches_tracked": experts.base["norm.num_batches_tracked"]}
    for bare in ({}, counters):
        without = replace(experts, base=bare, tuned=[bare] * len(experts))
        with pytest.raises(ValueError, match="base must have floating-point tensors to merge"):
            of.merge(without)


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("method", MERGE_METHODS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check, method, subject):
    check(subject(method))


def test_a_plug_in_keeps_the_contract(plug_in, subject):
    assert plug_in in MERGE_METHODS.names()
    for check in CHECKS:
        check(subject(plug_in))


def test_plug_in_of_another_distribution_stands_in_the_command(plug_in, capsys):
    from mergekit_lit.cli import main

    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[plug_in]["source"] == "Nobody 2026, eq. 1"
    assert rows[plug_in]["parameters"][0]["help"] == "length of the step, at least 0."
