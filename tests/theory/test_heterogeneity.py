"""Estimates of task gradients: their mean over many draws is the truth, where that is known."""

import pytest
import torch

from mergekit_lit.theory.heterogeneity import (
    TaskGradients,
    heterogeneity,
    mean_gradient_square,
    mean_slopes,
    per_sample_square,
    task_noise,
)

TASKS, SIZES, DIM = 3, (40, 60, 50), 7
ALONG = torch.linspace(-1.0, 2.0, DIM, dtype=torch.float64)[None]
DRAWS, BATCHES, BATCH = 600, 4, 5


@pytest.fixture(scope="module")
def samples():
    """Gradients of every sample of three tasks, whose means differ by less than the noise."""
    draw = torch.Generator().manual_seed(0)
    return [
        0.3 * torch.randn(DIM, generator=draw, dtype=torch.float64)
        + torch.randn(n, DIM, generator=draw, dtype=torch.float64)
        for n in SIZES
    ]


def drawn(samples, seed, *, replacement):
    """Micro-batch gradients of one draw."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for task in samples:
        if replacement:
            at = torch.randint(len(task), (BATCHES * BATCH,), generator=draw)
        else:
            at = torch.randperm(len(task), generator=draw)[: BATCHES * BATCH]
        rows.append(task[at].view(BATCHES, BATCH, DIM).mean(1))
    sizes = [None if replacement else len(task) for task in samples]
    return TaskGradients(rows, BATCH, sizes)


def truth(samples, weights):
    return float(sum(w * g.mean(0) for w, g in zip(weights, samples, strict=True)).square().sum())


ESTIMATES = {
    "merged": (
        lambda g: mean_gradient_square(g, [1 / 3] * 3),
        lambda s: truth(s, [1 / 3] * 3),
    ),
    "unequal": (
        lambda g: mean_gradient_square(g, [0.7, 0.1, 0.2]),
        lambda s: truth(s, [0.7, 0.1, 0.2]),
    ),
    "heterogeneity": (
        lambda g: heterogeneity(g, 1, [1 / 3] * 3),
        lambda s: truth(s, [-1 / 3, 2 / 3, -1 / 3]),
    ),
    "slope": (
        lambda g: mean_slopes(g, [0.7, 0.1, 0.2], ALONG, [slice(0, 3), slice(3, DIM)])[0],
        lambda s: float(
            sum(w * g.mean(0) for w, g in zip([0.7, 0.1, 0.2], s, strict=True)) @ ALONG[0]
        ),
    ),
    "noise": (
        lambda g: task_noise(g, 0),
        lambda s: float((s[0] - s[0].mean(0)).square().sum(1).mean()),
    ),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("replacement", [True, False])
def test_estimates_have_no_bias(samples, name, replacement):
    estimate, expected = ESTIMATES[name]
    found = [estimate(drawn(samples, seed, replacement=replacement)) for seed in range(DRAWS)]
    values = torch.tensor([e.value for e in found], dtype=torch.float64)
    error = float(values.std()) / DRAWS**0.5
    assert abs(float(values.mean()) - expected(samples)) < 3.5 * error


def test_the_plain_square_is_too_large(samples):
    """What the U-statistic is for: the plain form is far off in the same draws."""
    plain = []
    for seed in range(200):
        rows = drawn(samples, seed, replacement=True).rows
        plain.append(float(torch.stack([r.mean(0) for r in rows]).mean(0).square().sum()))
    expected = truth(samples, [1 / 3] * 3)
    assert sum(plain) / len(plain) > 1.3 * expected


def test_the_jackknife_covers_about_as_often_as_it_says(samples):
    expected = truth(samples, [-1 / 3, 2 / 3, -1 / 3])
    held = 0
    for seed in range(DRAWS):
        found = heterogeneity(drawn(samples, seed, replacement=True), 1, [1 / 3] * 3)
        held += found.low <= expected <= found.high
    assert 0.80 <= held / DRAWS <= 1.0


def test_samples_are_counted(samples):
    gradients = drawn(samples, 0, replacement=True)
    assert mean_gradient_square(gradients, [1 / 3] * 3).samples == TASKS * BATCHES * BATCH
    assert task_noise(gradients, 1).samples == BATCHES * BATCH


def test_equal_tasks_without_noise_do_not_differ():
    row = torch.ones(BATCHES, DIM)
    gradients = TaskGradients([row, row], BATCH, [None, None])
    assert heterogeneity(gradients, 0, [0.5, 0.5]).value == pytest.approx(0)
    assert mean_gradient_square(gradients, [0.5, 0.5]).value == pytest.approx(DIM)
    assert task_noise(gradients, 0).value == pytest.approx(0)


def test_squared_norms_of_samples():
    found = per_sample_square(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert found.value == 4.0
    # Student's quantile of three degrees of freedom.
    half = 3.182446 * (20 / 3) ** 0.5 / 2
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half), rel=1e-5)
    assert per_sample_square(torch.tensor([2.0])).low is None


def test_intervals_of_few_samples_hold_the_mean_as_often_as_they_say():
    draws = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [per_sample_square(row) for row in draws]
    held = sum(one.low <= 0 <= one.high for one in found) / len(found)
    # A normal quantile would hold it in 86 of 100.
    assert 0.935 <= held <= 0.965


def test_unequal_numbers_of_micro_batches_are_refused():
    gradients = TaskGradients([torch.ones(3, 2), torch.ones(2, 2)], 1, [None, None])
    with pytest.raises(ValueError, match="same number of micro-batches, at least 2"):
        heterogeneity(gradients, 0, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"at least 2, but they have \[1\]"):
        mean_gradient_square(TaskGradients([torch.ones(1, 2)], 1, [None]), [1.0])
