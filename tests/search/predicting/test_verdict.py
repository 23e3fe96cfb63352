"""The rule for experts of different bases, on cases made by hand."""

import pytest

from mergekit_lit.search.predicting.predict import Interval
from mergekit_lit.search.predicting.verdict import MOST_STRETCH, WAYS, Way, verdict


def gain(value, half=0.02):
    return Interval(value, value - half, value + half)


def ways(*gains, stretches=(5.0, 4.0, None)):
    return [
        Way(method, stretch, g) for method, stretch, g in zip(WAYS, stretches, gains, strict=True)
    ]


@pytest.mark.parametrize(
    ("gains", "choice", "method"),
    [
        ((gain(0.1), gain(0.05), gain(0.0)), "merge", "average"),
        ((gain(0.1), gain(0.2), gain(0.15)), "align", "git_rebasin"),
        ((gain(-0.3), gain(-0.1), gain(0.05)), "align", "zipit"),
        ((gain(-0.3), gain(-0.1), gain(-0.05)), "keep apart", None),
        # Not shown to gain anything: the interval holds 0.
        ((gain(-0.3), gain(0.01), gain(-0.05)), "keep apart", None),
        # Of ways that are equal the simplest.
        ((gain(0.1), gain(0.1), gain(0.1)), "merge", "average"),
    ],
)
def test_images_decide_by_what_is_gained_over_a_single_network(gains, choice, method):
    found = verdict(ways(*gains))
    assert (found.choice, found.method, found.basis) == (choice, method, "images")
    assert "validation images" in found.rule


def test_more_images_may_tell_only_where_the_interval_is_open():
    assert "more validation images" in verdict(ways(*[gain(0.01)] * 3)).reason
    assert "more validation images" not in verdict(ways(*[gain(-0.1)] * 3)).reason


@pytest.mark.parametrize(
    ("stretches", "choice", "method"),
    [
        ((0.7, 0.7, None), "merge", "average"),
        ((MOST_STRETCH, 0.1, None), "merge", "average"),
        ((1.2, 0.8, None), "align", "git_rebasin"),
        ((9.0, 7.0, None), "keep apart", None),
        ((None, None, None), "keep apart", None),
        ((float("inf"), float("nan"), None), "keep apart", None),
    ],
)
def test_without_images_the_stretch_decides(stretches, choice, method):
    found = verdict(ways(None, None, None, stretches=stretches))
    assert (found.choice, found.method, found.basis) == (choice, method, "weights")
    assert "nearer" in found.rule


def test_images_overrule_weights():
    near = ways(gain(-0.1), gain(-0.2), gain(-0.2), stretches=(0.1, 0.1, None))
    assert verdict(near).choice == "keep apart"


def test_a_gain_that_is_no_number_speaks_for_nothing():
    lost = Interval(float("nan"), float("nan"), float("nan"))
    assert verdict([Way("average", 0.1, lost)]).choice == "keep apart"


def test_no_way_is_refused():
    with pytest.raises(ValueError, match="at least one way"):
        verdict([])
