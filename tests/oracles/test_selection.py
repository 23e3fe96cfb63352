"""SCE, PCB, RAM, Nearswap and Breadcrumbs against literal NumPy transcriptions."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.selection import competition, nearswap, pcb, ram, sce
from mergekit_lit.merging.methods.sparsify import breadcrumbs

SHAPES = {"a": (30, 50), "b": (3,), "c": (), "d": (2, 3, 3, 3), "e": (1,)}


def model(seed=0, tasks=3, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [
        (name, torch.randn(tasks, *shape, generator=draw, dtype=torch.float64))
        for name, shape in shapes.items()
    ]


def a_slice(name, deltas, stats=None):
    info = TensorInfo("other", 0, "g")
    return Slice(name, torch.zeros_like(deltas[0]), deltas, info, stats or {}, 0)


def reference_sce(deltas, density):
    """Select, calculate, erase, on one flat tensor (T, n)."""
    tasks, n = deltas.shape
    variance = deltas.var(axis=0)
    if density < 1 and (variance > 0).any():
        kept = max(1, int((variance > 0).sum() * density))
        selected = np.argsort(variance)[n - kept :]
        mask = np.zeros(n)
        mask[selected] = 1
        deltas = deltas * mask
    weights = np.array([np.mean(d**2) for d in deltas])
    weights = weights / weights.sum()
    step = np.zeros(n)
    for p in range(n):
        sign = np.sign(deltas[:, p].sum())
        agree = [t for t in range(tasks) if np.sign(deltas[t, p]) == sign and deltas[t, p] != 0]
        if agree:
            mass = sum(weights[t] for t in agree)
            step[p] = sum(weights[t] * deltas[t, p] for t in agree) / mass
    return step


def reference_pcb(vectors, density):
    """Du et al. 2024 on flat task vectors (T, d)."""
    tasks, d = vectors.shape
    cut = int(d * 1e-4)
    total = vectors.sum(axis=0)
    weights = []
    for tau in vectors:
        size = np.sort(np.abs(tau))
        low, high = size[cut], size[d - cut - 1]
        n = ((np.clip(np.abs(tau), low, high) - low) / (high - low)) ** 2
        b = np.exp(tasks * n) * np.tanh(tau * total)
        quantile = np.sort(b)[d - int(d * density) - 1]
        b = np.maximum(b, quantile)
        weights.append((b - b.min()) / (b.max() - b.min()))
    weights = np.array(weights)
    return (weights * vectors).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)


def reference_breadcrumbs(deltas, drop, outliers):
    """Davari & Belilovsky 2023 on one flat layer (T, n)."""
    n = deltas.shape[1]
    step = np.zeros(n)
    for tau in deltas:
        order = np.argsort(np.abs(tau))
        mask = np.ones(n)
        mask[order[: int(n * drop)]] = 0
        mask[order[n - int(n * outliers) :]] = 0
        step += mask * tau
    return step


def rows(deltas):
    return deltas.numpy().reshape(len(deltas), -1)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_sce(density):
    for name, deltas in model():
        found = sce(a_slice(name, deltas), density=density, scale=1.5).numpy().ravel()
        np.testing.assert_allclose(found, 1.5 * reference_sce(rows(deltas), density), atol=1e-12)


def test_sce_of_one_expert_is_that_expert():
    (_, deltas), *_ = model(tasks=1)
    torch.testing.assert_close(sce(a_slice("a", deltas)), deltas[0])


@pytest.mark.parametrize("density", [0.02, 0.1, 0.9])
@pytest.mark.parametrize(
    "shapes", [SHAPES, {"big": (120, 100), "b": (3,)}]
)  # with and without tails
def test_pcb(density, shapes):
    pairs = model(shapes=shapes, tasks=4)
    (stats,) = competition(pairs, density=[density])
    found = np.concatenate(
        [
            pcb(a_slice(name, deltas, stats), density=density, scale=1.2).numpy().ravel()
            for name, deltas in pairs
        ]
    )
    vectors = np.concatenate([rows(deltas) for _, deltas in pairs], axis=1)
    np.testing.assert_allclose(found, 1.2 * reference_pcb(vectors, density), atol=1e-12)


def test_pcb_of_one_entry_and_of_no_movement_is_finite():
    for deltas in (torch.ones(2, 1), torch.zeros(2, 3), torch.full((2, 3), 0.5)):
        (stats,) = competition([("w", deltas)], density=[0.1])
        step = pcb(a_slice("w", deltas, stats), scale=1.0)
        torch.testing.assert_close(step, deltas[0])
    (stats,) = competition([], density=[0.1])
    assert stats["span"].shape == (0, 2)


@pytest.mark.parametrize(("drop", "outliers"), [(0.85, 0.007), (0.5, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_breadcrumbs(drop, outliers):
    for name, deltas in model():
        found = breadcrumbs(a_slice(name, deltas), drop=drop, outliers=outliers, scale=0.4)
        expected = 0.4 * reference_breadcrumbs(rows(deltas), drop, outliers)
        if drop < 1:
            np.testing.assert_allclose(found.numpy().ravel(), expected, atol=1e-12)
        else:  # the largest entry lies on the bound, which is kept
            assert (found != 0).sum() <= len(deltas)


def test_breadcrumbs_keep_entries_as_large_as_the_bounds():
    deltas = torch.full((2, 10), 0.25)
    step = breadcrumbs(a_slice("w", deltas), drop=0.5, outliers=0.2, scale=1.0)
    torch.testing.assert_close(step, deltas.sum(0))
    assert breadcrumbs(a_slice("w", torch.zeros(2, 0))).shape == (0,)


def test_ram_sums_what_one_moved_and_averages_what_several_moved():
    deltas = torch.tensor([[0.5, 0.2, 1e-6, 0.0], [0.0, 0.4, 2e-6, -0.3], [1e-6, 0.0, 0.0, -0.1]])
    expected = torch.tensor([0.5, 0.3, 0.0, -0.2])
    torch.testing.assert_close(ram(a_slice("w", deltas)), expected)


def test_nearswap_follows_an_entry_no_further_than_its_reach():
    base, other, reach = np.array([1.0, 2.0, 3.0]), np.array([1.0005, 1.5, 3.0]), 1e-3
    gap = np.abs(base - other)
    weight = np.clip(reach / np.where(gap > 0, gap, 1), 0, 1)
    expected = base * (1 - weight) + other * weight
    deltas = torch.from_numpy(other - base)[None]
    found = base + nearswap(a_slice("w", deltas), reach=reach).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_search_may_let_nearswap_follow_most_entries_to_the_sum_of_eight_experts():
    # As large as the deltas of the shipped experts.
    deltas = 4e-3 * torch.randn(8, 40, 50, generator=torch.Generator().manual_seed(3))
    ends = {name: high for name, (_, high) in MERGE_METHODS.get("nearswap").facts["search"].items()}
    found = nearswap(a_slice("w", deltas), **ends)
    whole = deltas.sum(dim=0)
    assert (found - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: sce(s, density=0), r"`density` must lie in \(0, 1\], but is 0"),
        (lambda s: sce(s, scale=-1), "`scale` must be at least 0, but is -1"),
        (lambda s: pcb(s, density=1.5), r"`density` must lie in \(0, 1\], but is 1.5"),
        (lambda s: ram(s, threshold=-1), "`threshold` must be at least 0, but is -1"),
        (lambda s: nearswap(s, reach=-1), "`reach` must be at least 0, but is -1"),
        (lambda s: breadcrumbs(s, drop=1.1), r"`drop` must lie in \[0, 1\], but is 1.1"),
        (
            lambda s: breadcrumbs(s, drop=0.9, outliers=0.2),
            r"`drop` \+ `outliers` must be at most 1, but are 0.9 \+ 0.2",
        ),
    ],
)
def test_values_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(a_slice("w", torch.ones(2, 3)))
