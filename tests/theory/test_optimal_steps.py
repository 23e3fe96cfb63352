"""Coefficients that minimise what bounds the loss after the step that deltas make."""

from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.theory.optimal_steps import Steps, best_steps


def steps(seed=0, blocks=2, experts=3, width=6):
    draw = np.random.default_rng(seed)
    deltas = draw.normal(0.0, 1.0, (blocks, experts, width)) * np.array([1.0, 3.0, 0.5])[:, None]
    squares = (deltas**2).sum(2)
    return Steps(
        p=np.full(experts, 1 / experts),
        travel=np.array([1.0, 3.0, 0.5]),
        moved=squares / squares.sum(0),
        slopes=-draw.exponential(1.0, (blocks, experts)),
        products=deltas @ deltas.transpose(0, 2, 1),
        eps2=np.array([0.01, 0.2, 0.02]),
        smoothness=1.5,
        sample_gradient2=2.0,
    )


STEPS = steps()


def a_eff(of, rows):
    return float((of.moved * rows * of.travel).sum())


def test_the_value_is_the_descent_lemma_s_by_hand():
    """Two experts of one block, deltas (1, 0) and (1, 2)."""
    of = Steps(
        p=np.array([0.5, 0.5]),
        travel=np.ones(2),
        moved=np.ones((1, 2)),
        slopes=np.array([[-1.0, -0.5]]),
        products=np.array([[[1.0, 1.0], [1.0, 5.0]]]),
        eps2=np.array([0.04, 0.0]),
        smoothness=3.0,
        sample_gradient2=4.0,
    )
    # The step is 0.5 (1, 0) + 0.25 (1, 2) = (0.75, 0.5); Delta^2 is 0.5 * 0.25 * 0.04.
    by_hand = -0.5 - 0.125 + 1.5 * (0.75**2 + 0.5**2) + (4 * 0.005) ** 0.5 + 1.5 * 0.005
    assert of.value(np.array([[0.5, 0.25]])) == pytest.approx(by_hand)


def test_it_is_jointly_convex(check_convex):
    check_convex(STEPS)


def test_its_slope_is_that_of_differences(check_slope):
    check_slope(STEPS)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("travel", [0.1, 0.5, 2.0])
def test_no_rows_of_the_same_travel_are_better(travel, blocks):
    of = steps(blocks=blocks)
    found = best_steps(of, travel=travel, most=4.0)
    assert a_eff(of, found) == pytest.approx(travel)
    assert found.min() >= 0
    draw = np.random.default_rng(2)
    tried = [draw.exponential(1.0, (blocks, 3)) for _ in range(2000)]
    tried += [found + 0.03 * draw.normal(size=(blocks, 3)) for _ in range(2000)]
    tried = [np.maximum(rows, 0) for rows in tried]
    tried = [rows * travel / a_eff(of, rows) for rows in tried if rows.any()]
    assert of.value(found) <= min(map(of.value, tried)) + 1e-6


def test_a_free_travel_is_no_worse_than_any_fixed_one():
    free = STEPS.value(best_steps(STEPS, travel=None, most=4.0))
    fixed = [STEPS.value(best_steps(STEPS, travel=a, most=4.0)) for a in (0.05, 0.2, 0.8, 2.0)]
    assert free <= min(fixed) + 1e-6


def test_where_no_step_helps_all_are_zero():
    assert not best_steps(replace(STEPS, slopes=-STEPS.slopes), travel=None, most=4.0).any()


def test_of_orthogonal_deltas_each_is_moved_as_far_as_its_travel_is_worth():
    deltas = np.diag([0.1, 1.0, 1.0])
    of = Steps(
        p=np.full(3, 1 / 3),
        travel=np.array([0.1, 1.0, 1.0]),
        moved=np.ones((1, 3)),
        slopes=-np.array([[0.01, 0.1, 0.1]]),
        products=(deltas @ deltas.T)[None],
        eps2=np.zeros(3),
        smoothness=100.0,
        sample_gradient2=1.0,
    )
    found = best_steps(of, travel=0.7, most=2.0)[0]
    # lambda_i is as s_i / ||tau_i||^2: travels of a third each, none of them all.
    assert found * of.travel == pytest.approx(np.full(3, 0.7 / 3), rel=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_units_of_the_loss_do_not_matter(size):
    scaled = replace(
        STEPS,
        slopes=size * STEPS.slopes,
        smoothness=size * STEPS.smoothness,
        sample_gradient2=size**2 * STEPS.sample_gradient2,
    )
    found, plain = (best_steps(of, travel=0.5, most=4.0) for of in (scaled, STEPS))
    assert found == pytest.approx(plain, abs=2e-3)
