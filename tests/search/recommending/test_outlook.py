"""The outlook: laws that are found again, and shares."""

import math

import pytest

from mergekit_lit.search.recommending.outlook import Known, Law, fit_law, fit_share


def test_a_law_is_found_again_from_what_it_made():
    law = Law(0.03, 0.5, 0.2)
    seen = [Known(s, noise, 0.0) for s in (0.1, 0.3, 1.0, 3.0) for noise in (0.0, 0.01)]
    found = fit_law([(known, law.change(known)) for known in seen])
    far = Known(30.0, 0.02, 0.0)
    assert found.change(far) == pytest.approx(law.change(far), rel=0.05)
    assert found.noise == pytest.approx(0.2, rel=0.1)


def test_nothing_gained_is_no_progress():
    found = fit_law([(Known(0.1, 0.01, 0.0), 0.02), (Known(1.0, 0.1, 0.0), 0.2)])
    assert found.progress(Known(30.0, 0.0, 0.0)) == pytest.approx(0.0, abs=1e-12)
    assert found.change(Known(1.0, 0.1, 0.0)) == pytest.approx(0.2)


def test_one_merge_is_enough_and_the_law_passes_through_it():
    known = Known(1.0, 0.0, 0.0)
    assert fit_law([(known, -0.1)]).change(known) == pytest.approx(-0.1)


def test_the_law_bends_within_what_was_measured():
    # A straight line: the turning point is the largest travel, and not further.
    found = fit_law([(Known(s, 0.0, 0.0), -0.1 * s) for s in (0.1, 0.2, 0.4)])
    assert found.turn == pytest.approx(0.4)
    assert found.change(Known(40.0, 0.0, 0.0)) > -0.1 * 40


def test_a_share_is_least_squares_through_0_and_not_below():
    assert fit_share([(1.0, 0.5), (2.0, 1.0)]) == pytest.approx(0.5)
    assert fit_share([(1.0, -0.5)]) == 0.0
    assert fit_share([]) == 0.0
    assert math.isfinite(fit_share([(0.0, 1.0)]))
