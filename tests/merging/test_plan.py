"""Plans: every tensor's fate told in advance, as the merge then decides, and nothing read."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.specs import Computed, Spec
from mergekit_lit.merging import load_experts, load_raw, merge, plan, save_raw, select
from mergekit_lit.merging.timing import expected_seconds


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("adamerging", {"lr": 0.0}, "`lr` must be above 0"),
        ("adamerging", {"density": 0.0}, "`density` must lie in"),
        ("bound_optimal", {"travel": -1.0}, "`travel` must be positive"),
        ("bound_optimal", {"micro_batches": 1}, "`micro_batches` must be at least 2"),
        ("fisher", {"floor": 0.0}, "`floor` must be above 0"),
        ("greedy_soup", {"samples": 0}, "`samples` must be at least 1"),
        ("mats", {"iterations": 0}, "`iterations` must be at least 1"),
        ("regmean", {"ridge": 0.0}, "`ridge` must be above 0"),
        ("regmean_plus_plus", {"off_diagonal": 2.0}, "`off_diagonal` must lie in"),
        ("repair", {"samples": 1}, "`samples` must be at least 2"),
        ("surgery", {"rank": 0}, "`rank` must be at least 1"),
    ],
)
def test_values_of_methods_that_look_at_images_are_refused_before_any_is_read(
    make_experts, headers_of, method, config, message
):
    with pytest.raises(ValueError, match=message):
        plan(headers_of(make_experts(3)), method, config=config)


@pytest.mark.parametrize("method", MERGE_METHODS.names())
def test_the_plan_is_what_the_merge_then_does(make_experts, headers_of, method):
    low, high = MERGE_METHODS.get(method).facts.get("experts", (1, None))
    experts = make_experts(high or max(low, 3), dtype=torch.bfloat16)
    told = plan(headers_of(experts), method, out_dtype="float32")
    fates = {row.name: row.fate for row in told.rows}
    assert [name for name, fate in fates.items() if fate == "merged"] == [
        name for name in experts.base if name in experts.merged_names()
    ]
    assert fates["norm.running_var"] == "statistic"
    assert fates["norm.num_batches_tracked"] == "counter"
    assert fates["heads/task0.weight"] == "head"
    data_free = MERGE_METHODS.get(method).facts["data"] in ("none", "cards")
    if data_free:
        merged = merge(experts, method, out_dtype="float32")
        assert told.config == merged.facts["config"]
        for row in told.rows[: len(merged.shared)]:
            tensor = merged.shared[row.name]
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{row.out_dtype}", row.shape)
            assert row.fate == "merged" or torch.equal(
                tensor, experts.base[row.name].to(tensor.dtype)
            )
    by_tensor = MERGE_METHODS.get(method).facts["form"] in ("linear", "kernel")
    assert (told.seconds is not None) == (by_tensor and data_free)
    assert json.loads(json.dumps(told.to_json())) is not None


def test_values_and_what_is_left_out_are_told_by_tensor(tiny_experts, headers_of):
    some = headers_of(select(tiny_experts, exclude=["token"]))
    told = plan(some, "ties", config={"scale": {"block": 0.5, "*": 0.2}, "density": 0.3})
    rows = {row.name: row for row in told.rows}
    assert rows["token"].fate == "kept"
    assert rows["token"].values == {}
    assert rows["block.bias"].values["scale"] == 0.5
    assert rows["stem.weight"].values == {
        "scale": 0.2,
        "density": 0.3,
        "combine": "mean",
        "trim": "model",
    }


def test_veneers_are_told_by_tensor_with_what_they_take(make_experts, headers_of):
    experts = make_experts(3, dtype=torch.float32)
    veneers = [("lines", {"alpha": 0.5}), ("equal_norms", {})]
    bare = plan(headers_of(experts), "ties", batch_norm="average")
    told = plan(headers_of(experts), "ties", batch_norm="average", veneers=veneers)
    assert [veneer["name"] for veneer in told.veneers] == ["lines", "equal_norms"]
    assert told.veneers[0]["config"] == {"alpha": 0.5, "beta": None}
    for row in told.rows:
        assert row.veneers == (("equal_norms", "lines") if row.fate == "merged" else ())
    result = sum(t.numel() * 4 for n, t in experts.base.items() if n in experts.merged_names())
    assert told.streamed_bytes == bare.streamed_bytes + 2 * result
    assert told.seconds is not None
    assert json.loads(json.dumps(told.to_json()))["veneers"][1]["position"] == "before"


def test_a_veneer_that_moves_units_is_told_where_it_acts(tiny_experts, headers_of):
    veneers = [("git_rebasin", {})]
    average = plan(headers_of(tiny_experts), "average", veneers=veneers, batch_norm="average")
    moved = {row.fate for row in average.rows if row.veneers}
    assert moved == {"merged", "statistic", "head"}
    assert average.seconds is None
    base = plan(headers_of(tiny_experts), "average", veneers=veneers)
    assert {row.fate for row in base.rows if row.veneers} == {"merged", "head"}


def test_bytes_are_those_of_the_files(tmp_path):
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {"w": torch.randn(50, 40, generator=draw), "n": torch.tensor(1)}
        head = {} if name == "base" else {"head.weight": torch.randn(3, 50, generator=draw)}
        save_file(tensors | head, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    experts = load_raw(paths, base=tmp_path / "base.safetensors")
    told = plan(experts, "average")
    assert told.read_bytes == 3 * 8000 + 8 + 2 * 600
    assert told.written_bytes == 8000 + 8 + 2 * 600
    written = save_raw(tmp_path / "m.safetensors", merge(experts, "average"))
    size = sum(path.stat().st_size for path in written)
    assert 0 < size - told.written_bytes < 3000  # headers
    assert told.streamed_bytes < told.peak_bytes


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("tiess", {}, KeyError, "Did you mean 'ties'"),
        ("ties", {"config": {"densty": 1}}, KeyError, "Did you mean 'density'"),
        ("ties", {"config": {"scale": {"blok": 1}}}, ValueError, "matches none of 6"),
        ("ties", {"out_dtype": "half"}, KeyError, "No `out_dtype` named 'half'"),
        ("slerp", {}, ValueError, "'slerp' takes 2 experts, but got 3"),
        ("lines", {"config": {"beta": [0.1, 0.2]}}, ValueError, "treats the model as a whole"),
        ("ties", {"veneers": [("line", {})]}, KeyError, "Did you mean 'lines'"),
        ("ties", {"veneers": [("lines", {"alfa": 1})]}, KeyError, "named 'alfa'"),
    ],
)
def test_bad_requests_are_refused_as_by_the_merge(
    tiny_experts, headers_of, method, options, error, message
):
    for function in (plan, merge):
        with pytest.raises(error, match=message):
            function(headers_of(tiny_experts), method, **options)


def test_more_experts_and_larger_matrices_are_expected_to_take_longer(make_experts):
    def seconds(method, side, count):
        experts = make_experts(count, dtype=torch.float32)
        shapes = {"block.weight": (side, side)}
        specs = {name: Spec(torch.float32, shape) for name, shape in shapes.items()}
        lazy = Computed(specs, lambda name: pytest.fail(f"{name} was read"))
        large = replace(experts, base=lazy, tuned=[lazy] * count)
        entry = MERGE_METHODS.get(method)
        config = plan(large, method).config
        return expected_seconds(entry, {"block.weight": config}, large, 0)

    assert seconds("task_arithmetic", 4096, 4) > 20 * seconds("task_arithmetic", 256, 4)
    assert seconds("tsv_m", 4096, 4) > 30 * seconds("tsv_m", 256, 4)


def test_experts_may_be_opened_by_their_headers_alone(tmp_path, make_experts):
    from mergekit_lit.core.cards import Card
    from mergekit_lit.core.expert_files import save_expert
    from mergekit_lit.core.experts import Base, Expert

    made = make_experts(1, dtype=torch.float32)
    base = Base("tiny", "tiny", 8, made.base, made.structure, "0")
    nan = {**made.tuned[0], "token": torch.full((1, 1), torch.nan)}
    card = Card(task="a", base="tiny", base_hash="0", image_size=8)
    save_expert(tmp_path / "a.safetensors", Expert(nan, {}, made.structure, card))
    with pytest.raises(ValueError, match="finite"):
        load_experts([tmp_path / "a.safetensors"], base=base)
    experts = load_experts([tmp_path / "a.safetensors"], base=base, headers_only=True)
    assert plan(experts, "average").rows[0].fate == "merged"
