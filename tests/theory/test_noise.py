import numpy as np
import pytest
import torch

from mergekit_lit.theory.noise import gradient_moments, moments_of, noise_scale


def population(n=60, d=4, seed=0):
    """Per-sample gradients (n, d) with a known mean and a known variance (divisor n)."""
    gradients = np.random.default_rng(seed).normal(0.3, 1.0, (n, d))
    return gradients, float((gradients.mean(0) ** 2).sum()), float(gradients.var(0).sum())


def drawn(gradients, rng, *, count, batch, replace):
    """K mean gradients (K, d) over micro-batches."""
    picked = rng.choice(len(gradients), count * batch, replace=replace)
    return gradients[picked].reshape(count, batch, -1).mean(1)


def moments(means, *, batch, n=None):
    square_of_sum = float((means.sum(0) ** 2).sum())
    return gradient_moments(
        square_of_sum, float((means**2).sum()), count=len(means), batch=batch, population=n
    )


@pytest.mark.parametrize(("count", "batch"), [(2, 1), (4, 5), (6, 10)])
@pytest.mark.parametrize("without_replacement", [False, True])
def test_estimates_are_unbiased(count, batch, without_replacement):
    gradients, signal, trace = population()
    rng, draws = np.random.default_rng(1), 4000
    n = len(gradients) if without_replacement else None
    found = [
        moments(
            drawn(gradients, rng, count=count, batch=batch, replace=not without_replacement),
            batch=batch,
            n=n,
        )
        for _ in range(draws)
    ]
    for values, expected in (
        ([m.signal for m in found], signal),
        ([m.trace for m in found], trace),
    ):
        error = np.std(values) / np.sqrt(draws)
        # Four standard errors; 1e-12 where all of the population is drawn and nothing varies.
        assert abs(np.mean(values) - expected) < 4 * error + 1e-12


def test_the_correction_matters():
    gradients, signal, _ = population(n=24)
    rng = np.random.default_rng(2)
    means = [drawn(gradients, rng, count=4, batch=5, replace=False) for _ in range(4000)]
    plain = np.array([moments(m, batch=5).signal for m in means])
    corrected = np.array([moments(m, batch=5, n=24).signal for m in means])
    error = corrected.std() / np.sqrt(len(means))
    assert abs(plain.mean() - signal) > 10 * error
    assert abs(corrected.mean() - signal) < 4 * error


def test_more_micro_batches_give_less_variance():
    gradients, _, _ = population(n=400)
    rng = np.random.default_rng(3)

    def spread(count):
        draws = [drawn(gradients, rng, count=count, batch=5, replace=True) for _ in range(800)]
        return np.var([moments(means, batch=5).trace for means in draws])

    # The variance of tr Sigma falls as 1 / (K - 1).
    assert spread(4) / spread(16) == pytest.approx(5.0, rel=0.35)


def test_the_trace_is_never_negative_and_the_signal_may_be():
    opposite = moments(np.array([[1.0], [-1.0]]), batch=1)
    assert opposite.signal < 0 < opposite.trace
    equal = moments(np.array([[2.0], [2.0]]), batch=1)
    assert (equal.signal, equal.trace) == (4.0, 0.0)


def test_tensors_and_sums_give_the_same():
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (5,), ()]
    gradients = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(4)]
    flat = np.stack([torch.cat([p.flatten() for p in g]).double().numpy() for g in gradients])
    found, expected = moments_of(gradients, batch=8), moments(flat, batch=8)
    assert found.signal == pytest.approx(expected.signal, rel=1e-5)
    assert found.trace == pytest.approx(expected.trace, rel=1e-5)


def test_noise_scale_is_unknown_where_the_signal_is_lost():
    assert noise_scale(6.0, 2.0) == 3.0
    assert noise_scale(6.0, -0.1) is None


@pytest.mark.parametrize(
    ("count", "batch", "n", "message"),
    [(1, 4, None, "at least 2 micro-batches"), (4, 4, 15, "needs? 16 samples")],
)
def test_draws_that_tell_nothing_are_refused(count, batch, n, message):
    with pytest.raises(ValueError, match=message):
        gradient_moments(1.0, 1.0, count=count, batch=batch, population=n)
