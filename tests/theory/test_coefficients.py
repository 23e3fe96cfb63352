"""Effective travel, shares and both divergences, against values worked out by hand."""

import math
from dataclasses import replace

import pytest

from mergekit_lit.theory.coefficients import (
    Block,
    chi_square,
    total_variation,
    weigh,
    weigh_blocks,
)
from mergekit_lit.theory.travel import step_l1


@pytest.mark.parametrize(
    ("slow", "fast", "expected"),
    [
        (1e-3, 1e-2, 2.025),
        (1e-3, 5e-3, 0.800),
        (5e-3, 1e-2, 0.125),
        (step_l1(1000, momentum=0.9), step_l1(4000, momentum=0.9), 0.569),
    ],
)
def test_equal_coefficients_of_unequal_travels_diverge(slow, fast, expected):
    found = weigh([1 / 6] * 6, [slow] * 3 + [fast] * 3)
    assert found.chi2_w == pytest.approx(expected, abs=1e-3)
    assert found.chi2_lambda == 0
    assert found.tv_lambda == 0
    assert found.tv_w == pytest.approx(abs(0.5 - slow / (slow + fast)))


def test_travel_normalised_coefficients_have_no_divergence():
    travels = [3.0, 7.0, 0.5]
    found = weigh([1 / (3 * s) for s in travels], travels)
    assert found.w == pytest.approx([1 / 3] * 3)
    assert found.chi2_w == pytest.approx(0, abs=1e-15)
    assert found.chi2_lambda > 0
    assert found.a_eff == pytest.approx(1.0)


def test_divergences_agree_where_travels_are_equal():
    found = weigh([0.2, 0.3, 0.5], [4.0] * 3, p=[0.5, 0.25, 0.25])
    expected = 0.3**2 / 0.2 + 0.05**2 / 0.3 + 0.25**2 / 0.5
    assert found.chi2_w == pytest.approx(expected)
    assert found.chi2_lambda == pytest.approx(expected)


def test_a_scale_of_all_coefficients_changes_the_travel_alone():
    one, many = weigh([0.5, 0.5], [1.0, 3.0]), weigh([1.5, 1.5], [1.0, 3.0])
    assert many.a_eff == pytest.approx(3 * one.a_eff)
    assert (many.chi2_lambda, many.chi2_w) == pytest.approx((one.chi2_lambda, one.chi2_w))


def test_coefficients_that_are_not_positive_have_total_variation_alone():
    found = weigh([0.0, 1.0], [1.0, 1.0])
    assert (found.chi2_lambda, found.chi2_w) == (None, None)
    assert found.tv_w == found.tv_lambda == pytest.approx(0.5)
    negative = weigh([-1.0, 2.0], [1.0, 1.0])
    assert negative.chi2_w is None
    assert negative.tv_w == pytest.approx(1.5)


def test_unknown_travels_leave_the_source_s_divergence():
    found = weigh([0.3, 0.7], [1.0, None])
    assert (found.a_eff, found.w, found.chi2_w, found.tv_w) == (None, None, None, None)
    assert found.chi2_lambda == pytest.approx(0.2**2 / 0.3 + 0.2**2 / 0.7)


def test_coefficients_that_cancel_have_no_shares():
    found = weigh([1.0, -1.0], [2.0, 2.0])
    assert found.a_eff == 0
    assert (found.w, found.tv_lambda) == (None, None)


def test_pieces():
    assert chi_square([0.5, 0.5], None) is None
    assert total_variation([0.5, 0.5], [0.2, 0.8]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("coefficients", "travels", "p", "message"),
    [
        ([], [], None, "at least one coefficient"),
        ([1.0], [1.0, 2.0], None, "`travels` must hold one number for each of the 1"),
        ([1.0, math.nan], [1.0, 2.0], None, "Coefficient 1 must be finite"),
        ([1.0], [0.0], None, r"travel must be positive and finite, but one is 0\.0"),
        ([0.5, 0.5], [1.0, 1.0], [0.5, 0.6], "`p` must be positive and sum to 1"),
        ([0.5, 0.5], [1.0, 1.0], [1.5, -0.5], "`p` must be positive and sum to 1"),
    ],
)
def test_bad_input_is_one_line(coefficients, travels, p, message):
    with pytest.raises(ValueError, match=message):
        weigh(coefficients, travels, p=p)


def test_block_means_that_cancel_are_no_step_of_0():
    blocks = [Block("low", (1.0, 1.0), (0.5, 0.5)), Block("high", (-1.0, -1.5), (0.5, 0.5))]
    found = weigh_blocks([blocks[0], replace(blocks[1], coefficients=(-1.0, -1.0))], [0.2, 0.1])
    assert found.w is None
    assert found.chi2_w is None
    # The farthest from 0, whatever its sign.
    assert weigh_blocks(blocks, [0.2, 0.1]).largest == (1.0, -1.5)
    assert weigh([0.0, 0.0], [None, 0.1]).w == (0.5, 0.5)
