import math

import pytest

from mergekit_lit.theory.stability import PathNoise, eps_path, stability_estimate, twin_spread
from mergekit_lit.theory.travel import effective_steps, sgd_rule


def test_a_worked_example():
    # n = 10, b = 2: 2/20 (0.01 * 4 + 0.04 * 9) + 2/100 (0.1 * 2 + 0.2 * 3)^2
    expected = 0.1 * 0.4 + 0.02 * 0.64
    assert eps_path([0.1, 0.2], [4.0, 9.0], n=10, batch=2) == pytest.approx(math.sqrt(expected))


def test_the_running_form_equals_the_finished_one():
    rules = [sgd_rule(0.1 / (k + 1), momentum=0.9, first=k == 0) for k in range(12)]
    variances = [1.0 + k % 3 for k in range(12)]
    noise = PathNoise()
    for rule, variance in zip(rules, variances, strict=True):
        noise = noise.advance(variance, rule)
    running = stability_estimate(noise.squares.total, noise.coherent.total, n=50, batch=4)
    finished = eps_path(effective_steps(rules).tolist(), variances, n=50, batch=4)
    assert math.sqrt(running) == pytest.approx(finished, rel=1e-12)


@pytest.mark.parametrize("k", [10, 1000])
def test_the_coherent_part_dominates_after_about_n_over_b_steps(k):
    n, b = 640, 64
    shaken = stability_estimate(k * 1.0, 0.0, n=n, batch=b)
    pushed = stability_estimate(0.0, k * 1.0, n=n, batch=b)
    assert pushed / shaken == pytest.approx(k / (n / b))


@pytest.mark.parametrize("name", ["n", "batch"])
def test_sizes_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but is 0"):
        stability_estimate(1.0, 1.0, **{"n": 10, "batch": 2, name: 0})


def test_the_interval_of_the_median_is_that_of_the_order_statistics():
    """Of n values the median lies between the ranks (n +- z sqrt(n)) / 2 with z = 1.96, or 0.67."""
    values = [float(rank) for rank in range(1, 202)]
    for level, half in ((0.95, 13.9), (0.5, 4.8)):
        found = twin_spread(values, level=level)
        assert found.median == 101
        assert (found.low, found.high) == pytest.approx((101 - half, 101 + half), abs=1.5)
