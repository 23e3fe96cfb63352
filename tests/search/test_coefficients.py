import math

import pytest
import torch

from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.merging.engine import merge, merge_many
from mergekit_lit.search.coefficients import choose, scale_grid


def method(**search):
    return Registered("m", print, {"search": search})


def test_grid_holds_zero_reaches_far_down_and_ends_at_the_top():
    grid = scale_grid(method(scale=(0.0, 1.5)))
    assert grid[0] == 0.0
    assert grid[1] == pytest.approx(0.015)
    assert grid[-1] == 1.5
    assert list(grid) == sorted(set(grid))


def test_grid_respects_the_declared_lower_end():
    assert scale_grid(method(scale=(0.5, 1.0)))[0] == 0.5
    assert min(scale_grid(method(scale=(0.5, 1.0)))) == 0.5


def test_method_without_scale_has_no_grid():
    assert scale_grid(method(density=(0.1, 1.0))) == ()
    assert scale_grid(Registered("m", print, {})) == ()


@pytest.mark.parametrize("name", ["task_arithmetic", "travel_normalised", "ties"])
def test_shipped_methods_search_from_zero(name):
    assert scale_grid(MERGE_METHODS.get(name))[0] == 0.0


def test_smallest_of_the_best_is_chosen_whatever_the_order():
    values = {0.0: 0.5, 0.1: 0.7, 0.3: 0.7, 1.0: 0.2}
    for scales in (list(values), list(values)[::-1]):
        choice = choose(scales, lambda ordered: [values[scale] for scale in ordered])
        assert choice.chosen == 0.1
        assert choice.scales == (0.0, 0.1, 0.3, 1.0)
        assert choice.values == (0.5, 0.7, 0.7, 0.2)


def test_diverged_candidates_are_never_chosen():
    assert choose([0.0, 1.0], lambda _: [0.1, math.nan]).chosen == 0.0
    with pytest.raises(ValueError, match="all are NaN"):
        choose([0.0, 1.0], lambda _: [math.nan, math.nan])


def test_bad_searches_are_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        choose([], lambda _: [])
    with pytest.raises(ValueError, match="needs one score"):
        choose([0.0, 1.0], lambda _: [0.5])


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare", "magmax", "iso_c"])
def test_merges_along_a_direction_are_the_methods_own(make_experts, name):
    experts = make_experts(3, torch.float32)
    scales = [0.0, 0.1, 0.5, 1.0]
    models = merge_many(experts, name, [{"scale": scale} for scale in scales])
    for scale, merged in zip(scales, models, strict=True):
        own = merge(experts, name, config={"scale": scale})
        assert merged.facts == own.facts
        assert all(torch.equal(merged.shared[key], tensor) for key, tensor in own.shared.items())
