"""Exact order statistics and sums, whatever the chunks, signs, ties and threads."""

import numpy as np
import pytest
import torch

from mergekit_lit.merging import quantiles
from mergekit_lit.merging.passes import Pairs
from mergekit_lit.merging.quantiles import threshold
from mergekit_lit.merging.reductions import gram, total


def chunked(values, sizes):
    return [("w", part) for part in values.split(sizes, dim=1)]


def smallest(pairs, ranks):
    return quantiles.smallest(pairs, lambda deltas: deltas, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
def test_smallest_is_sorting(dtype, coarse):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 500, generator=draw, dtype=torch.float64)
    values = ((values * 3).round() / 7 if coarse else values * 10**values).to(dtype)
    ranks = [1, 2, 250, 251, 499, 500]
    found = smallest(chunked(values, [200, 1, 299]), lambda _: ranks)
    expected = np.sort(values.double().numpy(), axis=1)[:, np.array(ranks) - 1]
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("misleading", [False, True])
def test_a_sample_never_changes_the_result(monkeypatch, misleading):
    monkeypatch.setattr(quantiles, "_SAMPLE", 1024)
    values = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    if misleading:
        # Every entry that a stride of a power of two can meet is larger than all the others.
        values[:, ::32] += 100
    counted = []
    real = quantiles._by_counting
    monkeypatch.setattr(quantiles, "_by_counting", lambda *a: counted.append(1) or real(*a))
    ranks = [0, 1, 20_000, 31_999, 40_000]
    found = smallest(chunked(values, 32 * 125), lambda _: ranks)
    expected = np.sort(values.double().numpy(), axis=1)[:, np.array(ranks[1:]) - 1]
    np.testing.assert_array_equal(found[:, 1:].numpy(), expected)
    assert bool(found[:, 0].isneginf().all())
    assert bool(counted) == misleading


class Thin(list):
    """Pairs that can be sampled: every third entry, or a sample that stands for nothing."""

    def __init__(self, pairs, values, *, misleading):
        super().__init__(pairs)
        self.entries = values.shape[1]
        self.taken = values[:, ::3] + 50 * misleading
        self.passes = 0

    def sample(self, count):
        return self.taken, self.entries

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize(("misleading", "passes"), [(False, 1), (True, 3)])
def test_what_can_be_sampled_is_gone_through_once(misleading, passes):
    values = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    pairs = Thin(chunked(values, 1000), values, misleading=misleading)
    found = smallest(pairs, lambda entries: [entries // 2])
    expected = np.sort(values.double().numpy(), axis=1)[:, 4499:4500]
    np.testing.assert_array_equal(found.numpy(), expected)
    assert pairs.passes == passes


@pytest.mark.parametrize("count", [1, 40, 10**9])
def test_experts_give_even_samples_of_their_deltas(tiny_experts, count):
    names = tiny_experts.merged_names()
    everything = torch.cat([tiny_experts.deltas(name).reshape(3, -1) for name in names], dim=1)
    sample, entries = Pairs(tiny_experts).sample(count)
    stride = max(1, entries // count) | 1
    assert entries == everything.shape[1]
    torch.testing.assert_close(sample, everything[:, ::stride])


def test_zeros_of_both_signs_huge_and_tiny_numbers():
    row = [-0.0, 0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]
    values = torch.tensor([row])
    found = smallest(chunked(values, 3), lambda entries: list(range(1, entries + 1)))
    np.testing.assert_array_equal(found[0].numpy(), np.sort(np.float32(row)))


def test_rank_0_lies_below_everything_and_no_entries_have_no_ranks():
    values = torch.tensor([[1.0, -5.0]])
    assert smallest(chunked(values, 2), lambda _: [0]).tolist() == [[-np.inf]]
    assert smallest([], lambda _: [1]).shape == (0, 1)


@pytest.mark.parametrize(("density", "expected"), [(1.0, 0), (0.5, 2), (0.25, 3), (0.01, 4)])
def test_threshold_of_one_tensor(density, expected):
    assert threshold(torch.tensor([[4.0, 2.0], [1.0, 3.0]]), density) == expected


@pytest.mark.parametrize("count", [0, 1, 5, 4096, 4097, 100_001])
def test_total_is_the_sum_for_any_number_of_threads(count, threads):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    one = total(values)
    assert one.dtype == torch.float64
    assert float(one) == pytest.approx(float(values.double().sum()), rel=1e-12, abs=1e-12)
    rows = values[: count // 3 * 3].reshape(3, -1)
    products = gram(rows)
    np.testing.assert_allclose(products, rows.double() @ rows.double().T, rtol=1e-10, atol=1e-10)
    with threads(3):
        assert torch.equal(total(values), one)
        assert torch.equal(gram(rows), products)
