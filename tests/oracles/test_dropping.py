"""DARE and DELLA against NumPy transcriptions of their papers that share only the draws."""

import math

import numpy as np
import pytest
import torch

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.dropping import dare, della, drawn


def a_slice(shape=(7, 5), count=3, name="w", seed=0, deltas=None):
    if deltas is None:
        draw = torch.Generator().manual_seed(7)
        deltas = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    info = TensorInfo("linear", 0, "g")
    return Slice(name, torch.zeros_like(deltas[0]), deltas, info, {}, seed)


def draws(tensor):
    """Return uniform numbers in [0, 1), of each expert's own stream."""
    shape = tensor.deltas[0].shape
    streams = [
        np.random.Philox(key=derive_seed(tensor.seed, tensor.name, t))
        for t in range(len(tensor.deltas))
    ]
    return [
        stream.random_raw(math.prod(shape)).view(np.uint32)[: math.prod(shape)].reshape(shape)
        / 2.0**32
        for stream in streams
    ]


def join(kept, rule, combine):
    """Sum or average, entry by entry, all of the entries or those of the elected sign."""
    step = np.zeros(kept[0].shape)
    for p in np.ndindex(step.shape):
        values = [k[p] for k in kept]
        if rule == "ties":
            sign = np.sign(sum(values))
            values = [v for v in values if np.sign(v) == sign and v != 0]
        if values:
            step[p] = np.sum(values) if combine == "sum" else np.mean(values)
    return step


def rescaled(kept, delta, keep, rescale):
    if rescale == "expected":
        return kept / keep
    if rescale == "l1" and np.abs(kept).sum() > 0:
        return kept * np.abs(delta).sum() / np.abs(kept).sum()
    return kept


def reference_dare(tensor, drop, rescale, rule, combine):
    kept = []
    for delta, u in zip(tensor.deltas.numpy(), draws(tensor), strict=True):
        kept.append(rescaled(np.where(u >= drop, delta, 0.0), delta, 1 - drop, rescale))
    return join(kept, rule, combine)


def reference_della(tensor, drop, window, rescale, rule, combine):
    kept = []
    for delta, u in zip(tensor.deltas.numpy(), draws(tensor), strict=True):
        rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
        p = np.zeros(rows.shape)
        for i, row in enumerate(rows):
            for rank, j in enumerate(np.argsort(np.abs(row), kind="stable")):
                p[i, j] = drop + window / 2 - window * rank / len(row)
        p = p.reshape(delta.shape)
        kept.append(rescaled(np.where(u >= p, delta, 0.0), delta, 1 - p, rescale))
    return join(kept, rule, combine)


@pytest.mark.parametrize("rule", ["linear", "ties"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_methods_equal_their_papers(rule, combine, rescale):
    options = {"rescale": rescale, "rule": rule, "combine": combine}
    for shape in ((7, 5), (3, 2, 3, 3), (9,), ()):
        tensor = a_slice(shape)
        found = dare(tensor, drop=0.4, scale=0.7, **options).numpy()
        np.testing.assert_allclose(found, 0.7 * reference_dare(tensor, 0.4, **options), atol=1e-12)
        found = della(tensor, drop=0.4, window=0.6, scale=0.7, **options).numpy()
        expected = 0.7 * reference_della(tensor, 0.4, 0.6, **options)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_draws_depend_on_the_place_and_not_on_the_blocks():
    whole = drawn((4000,), 0.3, key=11)
    parts = [drawn((n,), 0.3, key=11, offset=at) for at, n in ((0, 808), (808, 8), (816, 3184))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    each = drawn((4000,), torch.full((4000,), 0.3, dtype=torch.float64), key=11)
    np.testing.assert_array_equal(each, whole)
    assert abs(whole.mean() - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert not np.array_equal(drawn((4000,), 0.3, key=12), whole)


def test_without_a_window_della_drops_as_dare_does():
    tensor = a_slice()
    same = {"drop": 0.5, "rule": "ties", "combine": "mean", "scale": 1.0}
    torch.testing.assert_close(della(tensor, window=0.0, **same), dare(tensor, **same))


def test_larger_entries_are_kept_more_often_and_the_mean_stays():
    row = torch.linspace(0.5, 1.5, 1000, dtype=torch.float64)
    tensor = a_slice(deltas=row.repeat(400, 1)[None])
    step = della(tensor, drop=0.5, window=0.8, scale=1.0, rule="linear", combine="sum")
    kept = (step != 0).double().mean(dim=0)
    # Kept with probability 0.1 to 0.9 by rank; a tenth of the row has a standard error of 0.0025.
    assert abs(float(kept[:100].mean()) - 0.14) < 0.01
    assert abs(float(kept[-100:].mean()) - 0.86) < 0.01
    assert abs(float(step.mean()) - 1.0) < 0.02
    same_l1 = della(tensor, drop=0.5, window=0.8, scale=1.0, rule="linear", rescale="l1")
    assert float(same_l1.abs().sum()) == pytest.approx(float(row.sum()) * 400, rel=1e-12)


def test_empty_tensors_and_everything_dropped():
    for method in (dare, della):
        assert method(a_slice((0,))).shape == (0,)
        assert method(a_slice((0, 3))).shape == (0, 3)
    assert torch.isfinite(dare(a_slice((1,)), drop=0.99, rescale="l1")).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: dare(s, drop=1.0), r"`drop` must lie in \[0, 1\), but is 1.0"),
        (lambda s: dare(s, scale=-1), "`scale` must be at least 0, but is -1"),
        (lambda s: della(s, drop=0.05), "`drop` must lie in .* but is 0.05 with a window of 0.2"),
        (lambda s: della(s, drop=0.9, window=0.2), "`drop` must lie in .* but is 0.9"),
        (lambda s: della(s, window=-0.1), r"`window` must lie in \[0, 1\], but is -0.1"),
        (lambda s: della(s, scale=-1), "`scale` must be at least 0, but is -1"),
    ],
)
def test_values_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(a_slice())
