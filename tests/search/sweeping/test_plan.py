"""Plans: each value typed once, each trajectory once, names by content, neighbours together."""

import pytest

from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.plan import plan_runs


def names(plan):
    return {run.name for run in plan.runs}


def test_runs_know_their_configuration(sums):
    plan = plan_runs(read_axes({"a": [1, 2], "b": [3, 4]}), sums())
    found = [(plan.config(run)["a"], plan.config(run)["b"]) for run in plan.runs]
    assert found == [(1.0, 3), (1.0, 4), (2.0, 3), (2.0, 4)]
    assert len(names(plan)) == 4
    assert plan.keys == ("a", "b")


def test_steps_share_a_run_where_the_path_allows(sums):
    axes = {"a": [1, 2], "path": ["constant", "cosine"], "steps": [30, 10, 20]}
    plan = plan_runs(read_axes(axes), sums())
    assert sorted(run.steps for run in plan.runs) == sorted(2 * [(10, 20, 30), (10,), (20,), (30,)])
    assert plan.results == 12
    assert plan.shared == 2


def test_names_depend_on_content_alone(sums):
    one = plan_runs(read_axes({"a": [1, 2], "b": [3]}), sums())
    other = plan_runs(read_axes([{"b": [3], "a": [2]}, {"b": [3, 4], "a": [1.0]}]), sums())
    assert names(one) < names(other)
    assert len(names(other)) == 3


def test_what_one_mapping_of_axes_sets_is_not_set_in_the_next(sums):
    plan = plan_runs(read_axes([{"a": [5]}, {"b": [3]}]), sums())
    found = [(plan.config(run)["a"], plan.config(run)["b"]) for run in plan.runs]
    assert found == [(5.0, 0), (0.0, 3)]


def test_a_value_is_typed_once_not_once_a_point(sums):
    job = sums()
    axes = {"a": list(range(40)), "b": list(range(50)), "path": ["constant", "cosine"]}
    plan = plan_runs(read_axes(axes), job)
    assert len(plan.runs) == 4000
    assert job.completed <= 6
    assert all(isinstance(plan.config(run)["a"], float) for run in plan.runs)


def test_each_kind_has_its_own_keys(sums):
    plan = plan_runs(read_axes([{"kind": ["x"], "a": [1]}, {"kind": ["y"], "b": [2]}]), sums())
    assert [plan.config(run)["kind"] for run in plan.runs] == ["x", "y"]
    with pytest.raises(ValueError, match="No parameter named 'c'"):
        plan_runs(read_axes({"c": [1]}), sums())
