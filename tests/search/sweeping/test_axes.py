"""Axes become points: grids, lists, draws, and what is wrong with them."""

import math

import pytest

from mergekit_lit.search.sweeping.axes import Range, read_axes


def points(given):
    return [point for block in read_axes(given) for point in block.points()]


def test_a_grid_is_every_value_with_every_other():
    found = points({"model.lr": [0.1, 0.2], "data.task": {"grid": ["a", "b"]}})
    assert found == [
        {"model.lr": 0.1, "data.task": "a"},
        {"model.lr": 0.1, "data.task": "b"},
        {"model.lr": 0.2, "data.task": "a"},
        {"model.lr": 0.2, "data.task": "b"},
    ]


def test_lists_go_together_and_grids_multiply_them():
    found = points({"a": {"list": [1, 2]}, "b": {"list": ["x", "y"]}, "c": [True, False]})
    assert [tuple(point.values()) for point in found] == [
        (1, "x", True),
        (1, "x", False),
        (2, "y", True),
        (2, "y", False),
    ]


def test_several_mappings_are_several_sweeps_in_one():
    found = points([{"method": ["ties"], "density": [0.1, 0.2]}, {"method": ["average"]}])
    assert [len(point) for point in found] == [2, 2, 1]


def test_draws_are_seeded_within_their_ends_and_no_axis_moves_another():
    ends = {"low": "1e-5", "high": 1e-2, "log": True, "samples": 50, "seed": 3}
    alone = [point["wd"] for point in points({"wd": {"random": ends}})]
    other = {"random": {"low": 2, "high": 4, "seed": 1}}
    both = points({"size": other, "wd": {"random": ends}})
    assert [point["wd"] for point in both] == alone
    assert min(alone) >= 1e-5
    assert max(alone) <= 1e-2
    # Equal ratios are equally likely: half of them lie below the geometric mean.
    assert 15 <= sum(value < math.sqrt(1e-5 * 1e-2) for value in alone) <= 35
    assert {point["size"] for point in both} == {2, 3, 4}
    assert len(read_axes({"wd": {"random": ends}, "b": [1, 2]})[0]) == 100


@pytest.mark.parametrize(
    ("ends", "share", "number"),
    [
        (Range(low=1.0, high=3.0), 0.25, 1.5),
        (Range(low=1, high=3), 0.0, 1),
        (Range(low=1, high=3), 0.999, 3),
        (Range(low=1.0, high=100.0, log=True), 0.5, 10.0),
        (Range(low=1, high=1000, log=True), 1.0, 1000),
    ],
)
def test_a_share_of_a_range(ends, share, number):
    found = ends.at(share)
    assert found == pytest.approx(number)
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "is empty"),
        ([], "is empty"),
        ([{}], "must map keys"),
        ("lr", "must map keys"),
        ({"lr": []}, "`lr` must have a value to try at least, but is empty"),
        ({"lr": {"grid": None}}, "`lr` must have a value to try"),
        ({"lr": 0.1}, "`lr` must be a list of values"),
        ({"model": {"lr": [1], "seed": [2]}}, "`model` must be a list of values"),
        ({"lr": {"gird": [1]}}, "Did you mean 'grid'"),
        ({"lr": [1, 2, 1]}, "name each value once"),
        ({"a": {"list": [1]}, "b": {"list": [1, 2]}}, "one length, but `a` has 1, `b` has 2"),
        ({"lr": {"random": {"low": 1, "high": 2, "sample": 3}}}, "Did you mean 'samples'"),
        ({"lr": {"random": {"low": 2, "high": 1, "samples": 3}}}, "`low` below `high`"),
        ({"lr": {"random": {"low": 0, "high": 1, "log": True, "samples": 3}}}, "above 0"),
        ({"lr": {"random": {"low": 0, "high": 1}}}, "one number of `samples`"),
        (
            {"lr": {"random": {"low": 0, "high": 1, "samples": 2, "seed": "a"}}},
            "`seed` of the axis",
        ),
        ({"lr": {"random": 3}}, "must say `low` and `high`"),
        ({"lr": {"optuna": {"low": 0, "high": 1, "samples": 2}}}, "No setting named 'samples'"),
    ],
)
def test_what_is_no_axis_is_told_in_one_line(given, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read_axes(given)
    assert message in str(caught.value)
