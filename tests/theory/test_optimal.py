"""Coefficients that minimise the computable part of the bound, against brute force."""

from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.theory.optimal import Landscape, best_shares, optimum

LEVEL = Landscape(
    p=np.full(3, 1 / 3),
    travel=np.array([1.0, 1.0, 1.0]),
    start=np.array([1.0, 1.0, 1.0]),
    d2=np.array([0.1, 0.1, 0.1]),
    noise=np.array([0.2, 0.2, 0.2]),
    eps2=np.array([0.01, 0.01, 0.01]),
    smoothness=1.0,
    gradient2=2.0,
    sample_gradient2=1.0,
)
ROUGH = replace(
    LEVEL,
    travel=np.array([1.0, 3.0, 0.5]),
    start=np.array([1.0, 2.0, 1.5]),
    d2=np.array([0.1, 0.9, 0.05]),
    noise=np.array([0.2, 0.6, 0.1]),
    eps2=np.array([0.01, 0.2, 0.02]),
)


def simplex(steps):
    """All shares of three experts on a grid, without the border."""
    for i in range(1, steps):
        for j in range(1, steps - i):
            yield np.array([i, j, steps - i - j]) / steps


@pytest.mark.parametrize("travel", [0.05, 0.3, 1.0, 3.0])
def test_shares_are_the_best_of_a_grid(travel):
    found = ROUGH.value(best_shares(ROUGH, travel), travel)
    assert found <= min(ROUGH.value(w, travel) for w in simplex(60)) + 1e-9


def test_equal_experts_have_equal_shares():
    assert best_shares(LEVEL, 0.5) == pytest.approx(LEVEL.p, abs=1e-6)


def test_where_only_divergence_counts_travel_normalised_coefficients_are_best():
    only = replace(
        ROUGH,
        start=np.array([1.0, 1.001, 0.999]),
        d2=np.zeros(3),
        noise=np.zeros(3),
        eps2=np.zeros(3),
    )
    # Losses that differ a little leave sqrt(chi2) against a tilt too weak to move the kink.
    found = optimum(only, travel=0.7, most=1.0)
    assert found.shares == pytest.approx(only.p, abs=1e-4)
    assert found.coefficients == pytest.approx(0.7 / 3 / only.travel, rel=1e-3)


@pytest.mark.parametrize("smoothness", [1.0, 30.0, 300.0, 3000.0])
def test_shares_are_the_best_of_many_descents_whatever_the_scale(smoothness):
    draw = np.random.default_rng(1)
    for _ in range(6):
        rough = Landscape(
            p=np.full(4, 0.25),
            travel=draw.uniform(0.5, 3, 4),
            start=draw.uniform(1, 2, 4),
            d2=draw.uniform(0.05, 2, 4),
            noise=draw.uniform(1e-4, 1e-2, 4),
            eps2=draw.uniform(1e-6, 1e-3, 4),
            smoothness=smoothness,
            gradient2=1.0,
            sample_gradient2=10.0,
        )
        travel = float(rough.travel.mean())
        found = rough.value(best_shares(rough, travel), travel)
        tried = [rough.value(w, travel) for w in draw.dirichlet(np.full(4, 0.5), 4000) if w.min()]
        even = rough.value(rough.p, travel)
        assert found <= min(tried)
        # Far from flat: the shares matter.
        assert found < even - 0.05 * abs(even) or smoothness == 1.0


def test_the_slope_is_that_of_the_value():
    shares, small = np.array([0.5, 0.3, 0.2]), 1e-6
    for i, slope in enumerate(ROUGH.slope(shares, 0.8)):
        step = small * np.eye(3)[i]
        change = ROUGH.value(shares + step, 0.8) - ROUGH.value(shares - step, 0.8)
        assert slope == pytest.approx(change / (2 * small), rel=1e-6)


def test_the_divergence_alone_is_not_convex():
    # Why the search begins at several places.
    even = np.full(4, 0.25)
    only = replace(
        LEVEL,
        p=even,
        travel=np.ones(4),
        start=np.array([1.0, 2.0, 1.5, 1.2]),
        d2=np.zeros(4),
        noise=np.zeros(4),
        eps2=np.zeros(4),
    )
    level = replace(only, start=np.ones(4))

    def divergence(shares):
        return only.value(shares, 1.0) - level.value(shares, 1.0) - shares @ (only.start - 1)

    far = np.array([0.2024, 0.1946, 0.1959, 0.4071])
    middle = divergence((even + far) / 2)
    assert middle > 1.02 * (divergence(even) + divergence(far)) / 2


def test_the_search_over_the_travel_finds_its_minimum():
    found = optimum(ROUGH, travel=None, most=4.0)
    tried = [optimum(ROUGH, travel=a, most=4.0).value for a in np.linspace(0.01, 4.0, 80)]
    assert found.value <= min(tried) + 1e-6
    assert found.value < found.at_base
    assert found.coefficients == pytest.approx(found.travel * found.shares / ROUGH.travel)


def test_shares_alone_are_no_gain_on_the_base():
    draw = np.random.default_rng(0)
    cheaper = 0
    for trial in range(40):
        count = int(draw.integers(2, 9))
        steep = Landscape(
            p=np.full(count, 1 / count),
            travel=draw.uniform(0.5, 3, count),
            start=draw.uniform(0.3, 2.2, count),
            d2=draw.uniform(1, 9, count),
            noise=draw.uniform(0.1, 1, count),
            eps2=draw.uniform(1e-3, 1e-2, count),
            smoothness=30.0,
            gradient2=1e-6,
            sample_gradient2=10.0,
        )
        at_base = float(steep.p @ steep.start)
        still = best_shares(steep, 1e-9)
        cheaper += steep.value(still, 1e-9) < at_base - 1e-9
        assert steep.certified(still, 1e-9) >= at_base - 1e-6
        if trial < 3:
            assert not optimum(steep, travel=None, most=1.0).coefficients.any()
    # What the guard is for.
    assert cheaper > 5


def test_drift_that_outweighs_progress_leaves_the_base():
    far = replace(ROUGH, d2=np.array([9.0, 9.0, 9.0]))
    found = optimum(far, travel=None, most=4.0)
    assert found.coefficients.tolist() == [0.0, 0.0, 0.0]
    assert found.value == found.at_base == pytest.approx(1.5)


def test_one_expert_has_the_whole_share():
    alone = Landscape(
        **{
            name: value[:1] if isinstance(value, np.ndarray) else value
            for name, value in vars(replace(LEVEL, p=np.ones(3))).items()
        }
    )
    assert best_shares(alone, 1.0).tolist() == [1.0]
