"""Sparsifying methods against literal NumPy transcriptions of their papers."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.dropping import dare
from mergekit_lit.merging.methods.sparsify import magmax, magnitude_thresholds, ties, trim_and_elect

SHAPES = {"a": (7, 5), "b": (3,), "c": (), "d": (2, 3, 3, 3), "e": (1,)}


def model(seed=0, tasks=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [
        (name, torch.randn(tasks, *shape, generator=draw, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    ]


def a_slice(name, deltas, stats=None, seed=0):
    info = TensorInfo("other", 0, "g")
    return Slice(name, torch.zeros_like(deltas[0]), deltas, info, stats or {}, seed)


def flat(pairs):
    return np.stack(
        [
            np.concatenate([deltas[t].numpy().ravel() for _, deltas in pairs])
            for t in range(len(pairs[0][1]))
        ]
    )


def reference_thresholds(vectors, density):
    d = vectors.shape[1]
    rank = d - int(np.floor(d * density))
    return [np.sort(np.abs(v))[rank - 1] if rank else 0.0 for v in vectors]


def reference_ties(vectors, density, combine):
    """Yadav et al. 2023, algorithm 1, on flat task vectors, entry by entry."""
    thresholds = reference_thresholds(vectors, density)
    kept = np.array([v * (np.abs(v) >= t) for v, t in zip(vectors, thresholds, strict=True)])
    signs = np.sign(kept.sum(0))
    signs[signs == 0] = np.sign(signs.sum())
    step = np.zeros(vectors.shape[1])
    for p in range(vectors.shape[1]):
        agree = [v for v in kept[:, p] if np.sign(v) == signs[p] and v != 0]
        if agree:
            step[p] = np.mean(agree) if combine == "mean" else np.sum(agree)
    return step


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_equals_its_paper(density, combine):
    pairs = model()
    (stats,) = trim_and_elect(pairs, density=[density])
    found = np.concatenate(
        [
            ties(a_slice(n, d, stats), density=density, combine=combine).numpy().ravel()
            for n, d in pairs
        ]
    )
    np.testing.assert_allclose(found, reference_ties(flat(pairs), density, combine), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_exact_with_many_equal_magnitudes(dtype):
    draw = torch.Generator().manual_seed(3)
    coarse = [("w", (torch.randn(2, 400, generator=draw) * 3).round().to(dtype) / 7)]
    densities = (0.05, 0.3, 0.5, 0.77, 1.0)
    for found, density in zip(
        magnitude_thresholds(coarse, densities=densities), densities, strict=True
    ):
        np.testing.assert_array_equal(found, reference_thresholds(flat(coarse), density))


def test_exact_cancellation_takes_the_majority_sign():
    deltas = torch.tensor([[1.0, -2.0, -3.0], [-1.0, -2.0, -1.0]])
    (stats,) = trim_and_elect([("w", deltas)], density=[1.0])
    # Entry 0 cancels; the model's majority is negative, so expert 1's value stands.
    torch.testing.assert_close(
        ties(a_slice("w", deltas, stats), density=1.0), torch.tensor([-1.0, -2.0, -2.0])
    )


def test_the_majority_is_looked_up_where_entries_cancel_and_only_there():
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    apart = torch.tensor([[1.0, -2.0, 0.0], [2.0, 3.0, 0.0]])
    (stats,) = trim_and_elect(Counted([("w", apart)]), density=[1.0])
    before = len(passes)
    found = ties(a_slice("w", apart, stats), density=1.0)
    torch.testing.assert_close(found, torch.tensor([1.5, 3.0, 0.0]))
    assert len(passes) == before
    # Two entries cancel, and of the others as many are positive as negative: no majority.
    even = torch.tensor([[1.0, -2.0, 3.0, -4.0], [-1.0, -2.0, 3.0, 4.0]])
    (stats,) = trim_and_elect(Counted([("w", even)]), density=[1.0])
    before = len(passes)
    for _ in range(2):
        found = ties(a_slice("w", even, stats), density=1.0)
        torch.testing.assert_close(found, torch.tensor([0.0, -2.0, 3.0, 0.0]))
    assert len(passes) == before + 1


def test_ties_of_agreeing_experts_is_their_mean():
    pairs = [(name, deltas.abs()) for name, deltas in model()]
    (stats,) = trim_and_elect(pairs, density=[1.0])
    for name, deltas in pairs:
        step = ties(a_slice(name, deltas, stats), density=1.0)
        torch.testing.assert_close(step, deltas.mean(0))


def test_dare_keeps_the_mean_and_the_named_draws():
    deltas = torch.ones(2, 40_000, dtype=torch.float64)
    step = dare(a_slice("w", deltas), drop=0.75, scale=1.0)
    values, counts = step.unique(return_counts=True)
    assert values.tolist() == [0.0, 4.0, 8.0]
    # Binomial(2, 1/4): mean 1/2 a draw, so the step's mean is 2 with standard error 0.0122.
    assert abs(float(step.mean()) - 2.0) < 0.06
    assert abs(int(counts[0]) / 40_000 - 9 / 16) < 0.015
    again = dare(a_slice("w", deltas), drop=0.75, scale=1.0)
    assert torch.equal(step, again)
    other_name = dare(a_slice("v", deltas), drop=0.75, scale=1.0)
    other_seed = dare(a_slice("w", deltas, seed=1), drop=0.75, scale=1.0)
    assert not torch.equal(step, other_name)
    assert not torch.equal(step, other_seed)


def test_dare_without_drop_is_task_arithmetic():
    for name, deltas in model():
        torch.testing.assert_close(
            dare(a_slice(name, deltas), drop=0.0, scale=0.3), 0.3 * deltas.sum(0)
        )
    unscaled = dare(a_slice("w", torch.ones(1, 99)), drop=0.5, scale=1.0, rescale="none")
    assert set(unscaled.tolist()) == {0.0, 1.0}


def test_magmax_takes_the_largest_and_the_later_of_equals():
    deltas = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 4.0, -2.0]])
    torch.testing.assert_close(
        magmax(a_slice("w", deltas), scale=1.0), torch.tensor([-3.0, -5.0, -2.0])
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ties(s, density=0), r"`density` must lie in \(0, 1\], but is 0"),
        (lambda s: ties(s, scale=-0.1), "`scale` must be at least 0, but is -0.1"),
        (lambda s: dare(s, drop=1.0), r"`drop` must lie in \[0, 1\), but is 1.0"),
        (lambda s: dare(s, scale=-1), "`scale` must be at least 0, but is -1"),
        (lambda s: magmax(s, scale=-1), "`scale` must be at least 0, but is -1"),
    ],
)
def test_values_out_of_range(call, message):
    stats = {"thresholds": torch.zeros(2), "majority": lambda: 1}
    with pytest.raises(ValueError, match=message):
        call(a_slice("w", torch.ones(2, 3), stats))
