"""Masks packed into bits, and merged models with masks in files."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.bits import pack, unpack
from mergekit_lit.core.expert_files import load_merged, save_merged
from mergekit_lit.core.experts import Merged


@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (0,), (3, 5, 7), (0, 4)])
def test_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.tensor([True, False, True, False, False, False, False, False, True])
    assert pack(mask).tolist() == [5, 1]


def test_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match=r"of shape \(9,\) must be packed into 2 bytes, but .* 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), torch.Size([9]))


@pytest.fixture
def masked(tiny_experts) -> Merged:
    names = tiny_experts.merged_names()
    draw = torch.Generator().manual_seed(0)
    base = {name: tiny_experts.base[name] for name in names}
    return Merged(
        shared=tiny_experts.tuned[0],
        structure=tiny_experts.structure,
        heads={"a": {}, "b": {}, "c": {}},
        statistics={"b": {"norm.running_mean": torch.full((4,), 3.0, dtype=torch.float64)}},
        masks={
            task: {n: torch.rand(t.shape, generator=draw) < 0.5 for n, t in base.items()}
            for task in ("a", "b")
        },
        base=base,
        scales={"b": 1.5},
    )


def test_a_task_takes_the_step_where_its_mask_is_true(masked):
    for task, scale in (("a", 1.0), ("b", 1.5)):
        params = masked.for_task(task)
        for name, base in masked.base.items():
            step = masked.shared[name] - base
            expected = base + scale * step * masked.masks[task][name]
            torch.testing.assert_close(params[name], expected)
    assert torch.equal(masked.for_task("b")["norm.running_mean"], torch.full((4,), 3.0).double())
    whole = masked.for_task("c")
    assert all(torch.equal(whole[name], tensor) for name, tensor in masked.shared.items())


def test_masks_survive_the_file(tmp_path, masked):
    save_merged(tmp_path / "m", masked)
    read = load_merged(tmp_path / "m")
    assert set(read.masks) == {"a", "b"}
    for task, masks in masked.masks.items():
        assert all(torch.equal(read.masks[task][name], mask) for name, mask in masks.items())
    assert read.scales == {"b": 1.5}
    assert all(torch.equal(read.base[name], tensor) for name, tensor in masked.base.items())
    for task in masked.tasks:
        left, right = masked.for_task(task), read.for_task(task)
        assert all(torch.equal(left[name], right[name]) for name in left)
    save_merged(tmp_path / "again", read)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_mask_costs_one_bit_an_entry(tmp_path, masked):
    shared = {"w": torch.zeros(1 << 20)}
    large = replace(
        masked,
        shared=shared,
        base=shared,
        masks={"a": {"w": torch.ones(1 << 20, dtype=torch.bool)}},
        statistics={},
    )
    save_merged(tmp_path / "with", large)
    save_merged(tmp_path / "without", replace(large, masks={}))
    extra = (tmp_path / "with").stat().st_size - (tmp_path / "without").stat().st_size
    assert (1 << 17) <= extra < (1 << 17) + 500
