"""Coefficients by layer that minimise the computable part of the bound."""

from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.theory.optimal import Landscape
from mergekit_lit.theory.optimal_layers import Layers, best_rows

WHOLE = Landscape(
    p=np.full(3, 1 / 3),
    travel=np.array([1.0, 3.0, 0.5]),
    start=np.array([1.0, 2.0, 1.5]),
    d2=np.array([0.1, 0.9, 0.05]),
    noise=np.array([0.2, 0.6, 0.1]),
    eps2=np.array([0.01, 0.2, 0.02]),
    smoothness=1.0,
    gradient2=2.0,
    sample_gradient2=1.0,
)


def gradients(seed, blocks=2, tasks=3, width=5):
    draw = np.random.default_rng(seed).normal(0.4, 0.6, (blocks, tasks, width))
    return draw @ draw.transpose(0, 2, 1)


LAYERS = Layers(whole=WHOLE, moved=np.array([[0.3, 0.8, 0.5], [0.7, 0.2, 0.5]]), gram=gradients(0))


def a_eff(layers, rows):
    return float((layers.moved * rows * layers.whole.travel).sum())


def test_it_is_jointly_convex(check_convex):
    check_convex(LAYERS)


def test_its_slope_is_that_of_differences(check_slope):
    check_slope(LAYERS)


@pytest.mark.parametrize("travel", [0.1, 0.5, 2.0])
def test_no_rows_of_the_same_travel_are_better(travel):
    found = best_rows(LAYERS, travel=travel, most=4.0)
    assert a_eff(LAYERS, found) == pytest.approx(travel)
    assert found.min() >= 0
    draw = np.random.default_rng(2)
    tried = [draw.exponential(1.0, (2, 3)) for _ in range(2000)]
    tried += [found + 0.03 * draw.normal(size=(2, 3)) for _ in range(2000)]
    tried = [np.maximum(rows, 0) for rows in tried]
    tried = [rows * travel / a_eff(LAYERS, rows) for rows in tried]
    assert LAYERS.value(found) <= min(map(LAYERS.value, tried)) + 1e-6


def test_a_free_travel_is_no_worse_than_any_fixed_one():
    free = LAYERS.value(best_rows(LAYERS, travel=None, most=4.0))
    fixed = [LAYERS.value(best_rows(LAYERS, travel=a, most=4.0)) for a in (0.05, 0.2, 0.8, 2.0)]
    assert free <= min(fixed) + 1e-6


def test_where_no_step_helps_all_are_zero():
    far = replace(LAYERS, whole=replace(WHOLE, d2=np.full(3, 90.0)))
    assert not best_rows(far, travel=None, most=4.0).any()


def test_without_gradients_the_layers_are_alike():
    """Noise and stability alone: the mean square is least where all are the mean."""
    still = replace(LAYERS, gram=np.zeros((2, 3, 3)), whole=replace(WHOLE, d2=np.zeros(3)))
    found = best_rows(still, travel=0.5, most=4.0)
    assert found[0] == pytest.approx(found[1], rel=0.02, abs=1e-3)


def test_estimates_that_are_not_positive_are_taken_as_their_positive_part():
    wrong = replace(LAYERS, gram=gradients(0) - 0.5 * np.eye(3))
    assert np.isfinite(wrong.value(np.full((2, 3), 0.3)))
    assert best_rows(wrong, travel=0.5, most=4.0).min() >= 0
