"""Tests of the rank correlations that experiments share."""

import math

import pytest


@pytest.fixture(scope="module")
def correlations(experiment):
    return experiment("correlations")


def test_values_that_are_equal_but_for_rounding_are_ties(correlations):
    # 0.1 + 0.2 is more than 0.3 in its last digit; neither side's order may rest on that.
    alike = [0.3, 0.1 + 0.2, 0.3, 0.5]
    assert correlations.spearman(alike, [1, 2, 3, 4]) == correlations.spearman(
        [0.3, 0.3, 0.3, 0.5], [1, 2, 3, 4]
    )
    assert correlations.spearman([1, 2, 3, 4], alike) == correlations.spearman(
        [1, 2, 3, 4], [0.3, 0.3, 0.3, 0.5]
    )
    assert correlations.spearman([1, 2, 3], [0.3, 0.1 + 0.2, 0.3]) is None
    assert correlations.spearman([1, 2], [1, 2]) is None


def test_the_mean_within_steps_is_of_numbers_that_nothing_has_rounded(correlations):
    orders = {1: (1, 2, 3, 4, 5, 6), 2: (2, 1, 3, 4, 6, 5), 3: (6, 5, 4, 1, 2, 3)}
    points = [
        {"steps": steps, "x": place, "y": y}
        for steps, order in orders.items()
        for place, y in enumerate(order)
    ]
    points.append({"steps": 1, "x": math.nan, "y": 9.0})
    _, within = correlations.pooled_and_within(points, "x", "y")
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with sum d^2 = 0, 4 and 62.
    assert within == pytest.approx((1 + (1 - 24 / 210) + (1 - 372 / 210)) / 3, abs=1e-12)
