"""The space of a search: declared ranges, given values, and the order of a grid."""

import pytest

from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.search.coefficients import scale_grid
from mergekit_lit.search.tuning.space import grid_of, space_of, start_of

TIES = MERGE_METHODS.get("ties")


def whole(*, steps: int = 3, share: float = 0.5):
    """A method with a whole number."""


def test_scale_has_the_quickstarts_grid_and_wide_ranges_are_cut_by_ratios():
    space = space_of(TIES)
    assert space["scale"].values == scale_grid(TIES)
    assert space["density"].values == pytest.approx((0.05, 0.106, 0.224, 0.473, 1.0))
    assert start_of(space) == {"density": 0.2, "scale": 1.0}


def test_points_cut_every_range_from_end_to_end():
    space = space_of(MERGE_METHODS.get("slerp"), points=3)
    assert space["position"].values == (0.0, 0.5, 1.0)
    assert space_of(TIES, points=4)["scale"].values == pytest.approx((0.0, 0.333, 1.33, 3.0))
    with pytest.raises(ValueError, match="`points` must be at least 2, but is 1"):
        space_of(TIES, points=1)


def test_every_methods_grid_can_be_resolved_and_starts_at_its_defaults():
    for method in MERGE_METHODS:
        if method.name.startswith("test_"):
            continue
        space = space_of(method)
        defaults = resolve(method, {})
        assert start_of(space) == {name: defaults[name] for name in space}
        for config in grid_of(space):
            resolve(method, config)


def test_whole_numbers_stay_whole():
    method = Registered("whole", whole, {"search": {"steps": (1, 10), "share": (0.0, 1.0)}})
    assert space_of(method)["steps"].values == (1, 2, 3, 6, 10)
    assert space_of(method)["steps"].whole
    assert not space_of(method)["share"].whole


def test_the_start_comes_first_then_near_before_far_and_scales_together():
    space = space_of(TIES, given={"density": [1.0, 0.2, 0.3], "scale": [2.0, 1.5, 0.0]})
    assert start_of(space) == {"density": 0.2, "scale": 2.0}
    grid = [(config["density"], config["scale"]) for config in grid_of(space)]
    assert grid[:3] == [(0.2, 2.0), (0.2, 1.5), (0.2, 0.0)]
    assert [density for density, _ in grid] == [0.2] * 3 + [0.3] * 3 + [1.0] * 3


def test_fewer_trials_are_a_seeded_draw_that_more_trials_hold():
    space = space_of(TIES)
    whole_grid = grid_of(space)
    few, more = (grid_of(space, trials=count, seed=1) for count in (5, 20))
    assert len(few) == 5
    assert few[0] == start_of(space)
    assert all(config in more for config in few)
    assert [whole_grid.index(config) for config in more] == sorted(
        whole_grid.index(config) for config in more
    )
    assert grid_of(space, trials=5, seed=2) != few
    assert grid_of(space, trials=1) == [start_of(space)]
    assert grid_of(space, trials=10_000) == whole_grid


def test_given_values_replace_ranges_fix_parameters_and_add_undeclared_ones():
    space = space_of(TIES, given={"density": [0.5], "trim": ["tensor", "model"], "reach": [1]})
    assert list(space) == ["density", "scale", "trim"]
    assert (space["density"].start, space["density"].ends) == (0.5, None)
    assert (space["trim"].start, space["trim"].ends) == ("model", None)
    assert space_of(TIES, given={"scale": [0.5, 0.1]})["scale"].ends == (0.1, 0.5)


def test_a_method_without_ranges_is_tried_as_it_comes():
    assert grid_of(space_of(MERGE_METHODS.get("average"))) == [{}]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"density": []}, ValueError, "`space.density` must hold at least one value"),
        ({"density": ["much"]}, TypeError, "`density` of 'ties' must be"),
        ({"trim": ["model", "row"]}, TypeError, "`trim` of 'ties' must be"),
    ],
)
def test_values_that_the_method_cannot_take_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        space_of(TIES, given=given)
