"""The geometry of deltas and steps against NumPy."""

import math

import numpy as np
import pytest
import torch

from mergekit_lit.theory import geometry
from mergekit_lit.theory.geometry import (
    DeltaSums,
    StepSums,
    delta_sums,
    leading_subspace,
    mean_over_pairs,
    pairs_of,
    step_sums,
    subspace_overlap,
)

GROUPS = {"a.weight": "a", "a.bias": "a", "b": "b", "scalar": "b"}


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3, 2), "a.bias": (5,), "b": (7,), "scalar": ()}
    return {name: torch.randn(3, *shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def steps(tensors):
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(deltas.shape[1:], generator=draw) for name, deltas in tensors.items()}


def flat(parts):
    return np.concatenate([part.double().numpy().ravel() for part in parts])


@pytest.mark.parametrize("chunk", [2, 1 << 18])
def test_sums_are_numpys_globally_and_by_group(tensors, steps, monkeypatch, chunk):
    monkeypatch.setattr(geometry, "_CHUNK", chunk)
    angles = delta_sums(tensors.items(), GROUPS)
    kept = step_sums(tensors.items(), steps, GROUPS)
    assert list(angles) == list(kept) == ["a", "b"]
    cases = [
        (["a.weight", "a.bias"], angles["a"], kept["a"]),
        (["b", "scalar"], angles["b"], kept["b"]),
    ]
    cases.append(
        (list(tensors), DeltaSums.total(angles.values(), 3), StepSums.total(kept.values(), 3))
    )
    for names, angle, survived in cases:
        rows = np.stack([flat(tensors[name][t] for name in names) for t in range(3)])
        step = flat(steps[name] for name in names)
        norms = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(angle.norms, norms, rtol=1e-12)
        np.testing.assert_allclose(angle.cosine, rows @ rows.T / np.outer(norms, norms), atol=1e-12)
        opposite = [[np.mean(np.sign(s) != np.sign(t)) for t in rows] for s in rows]
        np.testing.assert_allclose(angle.sign_conflict, opposite, atol=1e-12)
        lost = 1 - np.abs(rows.sum(0)).sum() / np.abs(rows).sum()
        assert angle.cancellation == pytest.approx(lost, rel=1e-12)
        survival = rows @ step / norms**2
        assert survived.length == pytest.approx(np.linalg.norm(step), rel=1e-12)
        np.testing.assert_allclose(survived.survival, survival, rtol=1e-10)
        rest = np.linalg.norm(step - survival[:, None] * rows, axis=1) / norms
        np.testing.assert_allclose(survived.interference, rest, rtol=1e-10)


def test_a_step_along_one_delta_carries_nothing_else(tensors):
    sums = StepSums(3)
    for deltas in tensors.values():
        sums.add(deltas, 0.3 * deltas[1])
    assert float(sums.survival[1]) == pytest.approx(0.3, rel=1e-6)
    assert float(sums.interference[1]) == pytest.approx(0, abs=1e-3)


def test_what_did_not_move_has_no_direction():
    sums, step = DeltaSums(2), StepSums(2)
    deltas = torch.stack([torch.zeros(4), torch.ones(4)])
    sums.add(deltas)
    step.add(deltas, torch.ones(4))
    assert math.isnan(float(sums.cosine[0, 1]))
    assert pairs_of(sums.cosine, 1) == []
    assert mean_over_pairs(sums.cosine) is None
    assert step.survival.isnan().tolist() == step.interference.isnan().tolist() == [True, False]
    assert math.isnan(DeltaSums(2).cancellation)
    assert math.isnan(leading_subspace(torch.zeros(3, 3)).share)


@pytest.mark.parametrize("shape", [(12, 5), (4, 3, 3, 3), (6, 40)])
def test_subspaces_are_those_of_numpys_singular_vectors(shape):
    draw = torch.Generator().manual_seed(2)
    found = [leading_subspace(torch.randn(shape, generator=draw), rank=3) for _ in range(2)]
    draw = torch.Generator().manual_seed(2)
    bases = []
    for subspace in found:
        matrix = torch.randn(shape, generator=draw).double().flatten(1).numpy()
        u, values, _ = np.linalg.svd(matrix, full_matrices=False)
        assert subspace.share == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())
        bases.append(u[:, :3])
    overlap = np.linalg.norm(bases[0].T @ bases[1]) ** 2 / 3
    assert subspace_overlap(*found) == pytest.approx(overlap, rel=1e-9)
    assert subspace_overlap(found[0], found[0]) == pytest.approx(1)


def test_means_over_pairs_leave_out_what_is_unknown():
    matrix = torch.tensor([[1.0, 0.5, math.nan], [0.5, 1.0, 0.1], [math.nan, 0.1, 1.0]])
    assert mean_over_pairs(matrix) == pytest.approx(0.3)
    assert pairs_of(matrix, 0) == [0.5]
