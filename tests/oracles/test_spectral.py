"""Spectral methods against literal NumPy transcriptions of their papers."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.spectral import iso_c, iso_cts, knots, tsv_m


def a_slice(shape, tasks=3, seed=0, kind="linear", deltas=None) -> Slice:
    draw = torch.Generator().manual_seed(seed)
    if deltas is None:
        deltas = torch.randn(tasks, *shape, generator=draw, dtype=torch.float64)
    base = torch.zeros(shape, dtype=torch.float64)
    return Slice("w", base, deltas, TensorInfo(kind, 0, "g"), {}, 0)


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix):
    u, _, vt = svd(matrix)
    return u @ vt


def reference_tsv_m(deltas):
    """Gargiulo et al. 2025, algorithm 1, layer by layer."""
    tasks, rank = len(deltas), min(deltas[0].shape) // len(deltas)
    us, ss, vs = [], [], []
    for t in range(tasks):
        u, s, vt = svd(deltas[t])
        us.append(u[:, :rank])
        ss.append(s[:rank])
        vs.append(vt[:rank].T)
    return polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.hstack(vs)).T


def reference_iso_c(deltas):
    u, s, vt = svd(sum(deltas))
    return s.mean() * u @ vt


def reference_iso_cts(deltas, share):
    """Marczak et al. 2025, algorithm 2."""
    tasks, full = len(deltas), min(deltas[0].shape)
    total = round((full - int(share * full)) / tasks) * tasks
    common = full - total
    u, s, vt = svd(sum(deltas))
    us, ss, vs = [u[:, :common]], [s[:common]], [vt[:common].T]
    for t in range(tasks):
        rest = deltas[t] - us[0] @ us[0].T @ deltas[t]
        ut, st, vtt = svd(rest)
        us.append(ut[:, : total // tasks])
        ss.append(st[: total // tasks])
        vs.append(vtt[: total // tasks].T)
    return np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.hstack(vs)).T


def reference_knots(deltas, density, combine):
    """Stoica et al. 2024: one basis of outputs, then TIES on what each task has in it."""
    u, s, vt = svd(np.hstack(deltas))
    rank = np.linalg.matrix_rank(np.hstack(deltas))
    u, s, vt, parts = u[:, :rank], s[:rank], vt[:rank], []
    for v in np.split(vt, len(deltas), axis=1):
        size = np.sort(np.abs(v).ravel())
        dropped = v.size - int(v.size * density)
        parts.append(np.where(np.abs(v) >= size[dropped - 1] if dropped else True, v, 0.0))
    merged = np.zeros(parts[0].shape)
    for p in np.ndindex(merged.shape):
        values = [part[p] for part in parts]
        agree = [v for v in values if v != 0 and np.sign(v) == np.sign(sum(values))]
        if agree:
            merged[p] = np.mean(agree) if combine == "mean" else np.sum(agree)
    return u @ np.diag(s) @ merged


def low_rank(shape, rank, tasks=3):
    draw = torch.Generator().manual_seed(5)
    left = torch.randn(tasks, shape[0], rank, generator=draw, dtype=torch.float64)
    return left @ torch.randn(tasks, rank, shape[1], generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_knots_equals_its_paper(shape, density, combine):
    tensor = a_slice(shape)
    found = knots(tensor, density=density, combine=combine).numpy()
    expected = reference_knots(list(tensor.deltas.numpy()), density, combine)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_knots_trims_experts_of_low_rank_in_their_own_directions(density):
    deltas = low_rank((30, 24), rank=2)
    found = knots(a_slice((30, 24), deltas=deltas), density=density).numpy()
    expected = reference_knots(list(deltas.numpy()), density, "mean")
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert abs(found - knots(a_slice((30, 24), deltas=deltas), density=1.0).numpy()).max() > 0.1


def test_knots_of_lora_experts_stays_in_their_directions():
    deltas = low_rank((20, 15), rank=2)
    step = knots(a_slice((20, 15), deltas=deltas))
    assert torch.linalg.matrix_rank(step) <= 6
    together = torch.cat([*deltas, step], dim=1)
    assert torch.linalg.matrix_rank(together) == 6
    noise = 1e-9 * torch.randn(deltas.shape, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(
        knots(a_slice((20, 15), deltas=deltas + noise)), step, atol=1e-5, rtol=0
    )


def test_knots_without_election_is_the_average_of_the_deltas():
    tensor = a_slice((12, 9))
    torch.testing.assert_close(knots(tensor, rule="linear"), tensor.deltas.mean(dim=0))
    summed = knots(tensor, rule="linear", combine="sum", scale=0.3)
    torch.testing.assert_close(summed, 0.3 * tensor.deltas.sum(dim=0))


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_methods_equal_their_papers(shape):
    tensor = a_slice(shape)
    deltas = list(tensor.deltas.numpy())
    np.testing.assert_allclose(tsv_m(tensor).numpy(), reference_tsv_m(deltas), atol=1e-9)
    np.testing.assert_allclose(iso_c(tensor).numpy(), reference_iso_c(deltas), atol=1e-9)
    for share in (0.0, 0.7, 1.0):
        found = iso_cts(tensor, common_share=share).numpy()
        np.testing.assert_allclose(found, reference_iso_cts(deltas, share), atol=1e-9)


def test_a_convolution_is_its_matrix():
    convolution = a_slice((6, 2, 3, 3), kind="convolution")
    matrix = a_slice((6, 18), deltas=convolution.deltas.flatten(2))
    for method in (tsv_m, iso_c, iso_cts, knots):
        step = method(convolution)
        assert step.shape == (6, 2, 3, 3)
        torch.testing.assert_close(step.flatten(1), method(matrix))


@pytest.mark.parametrize("method", [tsv_m, iso_c, iso_cts, knots])
def test_other_tensors_take_the_scaled_mean(method):
    for shape, kind in [
        ((), "other"),
        ((5,), "linear"),
        ((1, 4, 8), "embedding"),
        ((0, 3), "linear"),
    ]:
        tensor = a_slice(shape, kind=kind)
        torch.testing.assert_close(method(tensor, scale=0.5), 0.5 * tensor.deltas.mean(dim=0))


def test_one_task_comes_back_from_tsv_m():
    tensor = a_slice((8, 5), tasks=1)
    torch.testing.assert_close(tsv_m(tensor), tensor.deltas[0])


def test_an_untuned_expert_changes_no_direction():
    moved = a_slice((12, 9), tasks=2)
    with_zero = a_slice((12, 9), deltas=torch.cat([moved.deltas, torch.zeros(1, 12, 9).double()]))
    # Rank 3 a task with three experts; the same rank-3 merge of the two that moved.
    trimmed = torch.stack([_truncated(delta, 3) for delta in moved.deltas])
    expected = tsv_m(a_slice((12, 9), deltas=torch.cat([trimmed, torch.zeros(1, 12, 9).double()])))
    torch.testing.assert_close(tsv_m(with_zero), expected)
    assert torch.linalg.matrix_rank(tsv_m(with_zero)) == 6


def test_the_isotropic_spectrum_is_flat():
    for method in (iso_c, iso_cts):
        values = torch.linalg.svdvals(method(a_slice((12, 9))))
        torch.testing.assert_close(values, values.mean().expand_as(values))


@pytest.mark.parametrize("method", [tsv_m, iso_c, iso_cts, knots])
def test_more_tasks_than_directions_and_no_movement(method):
    assert torch.isfinite(method(a_slice((3, 2), tasks=7))).all()
    assert not method(a_slice((4, 4), deltas=torch.zeros(3, 4, 4).double())).any()
    with pytest.raises(ValueError, match="`scale` must be at least 0, but is -1"):
        method(a_slice((4, 4)), scale=-1)


def test_common_share_out_of_range():
    with pytest.raises(ValueError, match=r"`common_share` must lie in \[0, 1\], but is 1.5"):
        iso_cts(a_slice((4, 4)), common_share=1.5)


def _truncated(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]
