"""Tests of mergekit_lit.reports.intervals: closed forms, coverage, pairing, packing."""

import numpy as np
import pytest

from mergekit_lit.reports.intervals import (
    accuracy_draws,
    difference_draws,
    mean_draws,
    mean_told,
    normalised_draws,
    pack_flags,
    percentile_interval,
    unpack_flags,
)


def _flags(n: int, share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def test_multinomial_draws_follow_the_law_of_resampled_images():
    """The literal bootstrap, image by image, has the same mean and spread."""
    model, expert = _flags(90, 0.6), _flags(90, 0.8, seed=1)
    draw = np.random.default_rng(5)
    picks = draw.integers(0, 90, size=(4000, 90))
    literal = model[picks].mean(1) / expert[picks].mean(1)
    ours = normalised_draws(model, expert, seed=0, draws=4000)
    assert ours.mean() == pytest.approx(literal.mean(), abs=4 * literal.std() / 4000**0.5 * 1.5)
    assert ours.std() == pytest.approx(literal.std(), rel=0.06)


def test_accuracy_spread_is_binomial():
    correct = _flags(400, 0.7)
    share = correct.mean()
    draws = accuracy_draws(correct, seed=0, draws=20_000)
    assert draws.mean() == pytest.approx(share, abs=1e-3)
    assert draws.std() == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(300):
        interval = percentile_interval(accuracy_draws(_flags(200, 0.7, seed), seed=seed, draws=500))
        inside += interval[0] <= 0.7 <= interval[1]
    assert 0.91 <= inside / 300 <= 0.98


def test_pairing_narrows_the_difference_of_like_models():
    left = _flags(300, 0.7)
    right = left.copy()
    right[:6] = ~right[:6]
    paired = difference_draws(left, right, seed=0)
    assert paired.mean() == pytest.approx(left.mean() - right.mean(), abs=2e-3)
    unpaired = accuracy_draws(left, seed=0, task="a") - accuracy_draws(right, seed=0, task="b")
    assert paired.std() < 0.35 * unpaired.std()


def test_a_model_equal_to_its_expert_is_exactly_one():
    correct = _flags(50, 0.6)
    assert percentile_interval(normalised_draws(correct, correct, seed=0)) == (1.0, 1.0)


def test_the_mean_of_tasks_is_narrower_than_one_task():
    tasks = [accuracy_draws(_flags(200, 0.7, i), seed=0, task=f"t{i}") for i in range(8)]
    assert mean_draws(tasks).std() == pytest.approx(tasks[0].std() / 8**0.5, rel=0.1)


def test_equal_seeds_draw_equal_and_tasks_draw_apart():
    correct = _flags(60, 0.5)
    assert np.array_equal(accuracy_draws(correct, seed=3), accuracy_draws(correct, seed=3))
    one, other = (accuracy_draws(correct, seed=3, task=t) for t in ("a", "b"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_an_expert_without_one_right_image_has_no_ratio():
    draws = normalised_draws([True, False], [False, False], seed=0)
    assert percentile_interval(draws) is None


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_packed_flags_come_back(n):
    flags = _flags(n, 0.5)
    assert np.array_equal(unpack_flags(pack_flags(flags), n), flags)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy_draws([], seed=0), r"N >= 1, but has shape \(0,\)"),
        (lambda: normalised_draws([True], [True, False], seed=0), "same images, but got 1 and 2"),
        (lambda: percentile_interval(np.zeros(3), level=1.0), r"`level` must lie in \(0, 1\)"),
        (lambda: unpack_flags("AA==", 9), "must hold 2 bytes, but hold 1"),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_mean_is_told_with_its_interval_where_there_is_one():
    assert mean_told([0.25]) == "0.250"
    # t of two values, one degree of freedom: 12.706 s / sqrt(2), s = sqrt(2).
    assert mean_told([1.0, 3.0], "+.1f") == "+2.0 [-10.7, +14.7]"
