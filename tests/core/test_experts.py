"""Base, expert and merged files: exact round trips, and the wrong kind refused."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import (
    file_kind,
    load_base_file,
    load_expert,
    load_merged,
    save_base,
    save_expert,
    save_merged,
)
from mergekit_lit.core.experts import Base, Expert, Merged
from mergekit_lit.core.structure import structure_from_json


def equal(left, right) -> bool:
    return dict(left).keys() == dict(right).keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def expert(tiny_experts) -> Expert:
    return Expert(
        backbone=tiny_experts.tuned[0],
        head={"weight": torch.ones(2, 7), "bias": torch.zeros(2)},
        structure=tiny_experts.structure,
        card=Card(task="mnist", betas=(0.9, 0.999), travel=0.1 + 0.2),
    )


def test_expert_round_trip(tmp_path, expert):
    path = tmp_path / "mnist.safetensors"
    save_expert(path, expert)
    read = load_expert(path)
    assert equal(read.backbone, expert.backbone)
    assert equal(read.head, expert.head)
    assert (read.structure, read.card, read.path) == (expert.structure, expert.card, path)
    assert file_kind(path) == "expert"


def test_same_expert_same_bytes(tmp_path, expert):
    save_expert(tmp_path / "a", expert)
    save_expert(tmp_path / "b", replace(expert, backbone=dict(reversed(expert.backbone.items()))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_name_without_a_task_is_the_files(tmp_path, expert):
    path = tmp_path / "found.safetensors"
    save_expert(path, replace(expert, card=Card()))
    assert load_expert(path).name == "found"
    assert replace(expert, card=Card()).name == "expert"


def test_merged_round_trip(tmp_path, tiny_experts):
    heads = {"b": {"weight": torch.ones(2, 7), "bias": torch.zeros(2)}, "a": {}}
    statistics = {"b": {"norm.running_mean": torch.full((4,), 3.0, dtype=torch.float64)}}
    merged = Merged(
        shared=tiny_experts.base,
        structure=tiny_experts.structure,
        heads=heads,
        statistics=statistics,
        facts={"method": "average", "coefficients": [0.5, 0.5]},
    )
    save_merged(tmp_path / "m", merged)
    read = load_merged(tmp_path / "m")
    assert equal(read.shared, merged.shared)
    assert read.tasks == ("b", "a")
    assert equal(read.heads["b"], heads["b"])
    assert read.heads["a"] == {}
    assert set(read.statistics) == {"b"}
    assert read.facts == merged.facts
    assert equal(read.for_task("b"), {**merged.shared, **statistics["b"]})
    assert equal(read.for_task("a"), merged.shared)


def test_tasks_whose_names_start_alike_are_kept_apart(tmp_path, tiny_experts):
    heads = {"cars": {"bias": torch.zeros(1)}, "cars.new": {"bias": torch.ones(1)}}
    save_merged(tmp_path / "m", Merged(tiny_experts.base, tiny_experts.structure, heads=heads))
    read = load_merged(tmp_path / "m")
    assert equal(read.heads["cars.new"], heads["cars.new"])
    assert equal(read.heads["cars"], heads["cars"])


def test_base_in_half_precision_is_read_in_float32(tmp_path, tiny_experts):
    base = Base("tiny", "tiny", 8, tiny_experts.base, tiny_experts.structure, "0" * 64)
    save_base(tmp_path / "b", base, dtype=torch.float16)
    params, facts = load_base_file(tmp_path / "b")
    assert params["stem.weight"].dtype == torch.float32
    assert torch.equal(params["stem.weight"], base.params["stem.weight"].half().float())
    assert params["norm.num_batches_tracked"].dtype == torch.int64
    assert facts["base"] == {"name": "tiny", "backbone": "tiny", "image_size": 8}


def test_wrong_kind_is_refused(tmp_path, expert):
    path = tmp_path / "e"
    save_expert(path, expert)
    with pytest.raises(ValueError, match=r"must be a merged file of mergekit-lit, but .*'expert'"):
        load_merged(path)
    with pytest.raises(ValueError, match=r"must be a base file of mergekit-lit, but .*'expert'"):
        load_base_file(path)


def test_deltas_are_at_least_float32_and_whole(make_experts):
    experts = make_experts(dtype=torch.bfloat16)
    deltas = experts.deltas("block.weight")
    assert deltas.shape == (3, 7, 5)
    assert deltas.dtype == torch.float32
    assert make_experts().deltas("logit_scale").shape == (3,)


def test_merged_names_hold_no_statistics_counters_or_integers(tiny_experts):
    base = {**tiny_experts.base, "index": torch.arange(3)}
    structure = {**tiny_experts.structure, "index": tiny_experts.structure["logit_scale"]}
    names = replace(tiny_experts, base=base, structure=structure).merged_names()
    assert names == sorted(names)
    assert set(names) == {
        "stem.weight",
        "norm.weight",
        "block.weight",
        "block.bias",
        "token",
        "logit_scale",
    }


def test_unknown_kind_of_tensor_is_refused():
    with pytest.raises(ValueError, match=r"Kind of 'w' must be one of linear, .*but is 'lineer'"):
        structure_from_json({"w": {"kind": "lineer", "depth": 0, "group": "", "axes": []}})
