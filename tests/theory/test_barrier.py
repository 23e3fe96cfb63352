"""What averaging is expected to cost, beside NumPy and losses that are parabolas."""

import math

import numpy as np
import pytest
import torch

from mergekit_lit.theory.barrier import (
    distance,
    distances_to_mean,
    mean_stretch,
    second_order_cost,
)


def drawn(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(3, 4, generator=draw), "b": torch.randn(5, generator=draw)}
        for _ in range(count)
    ]


def test_distances_to_the_mean_are_those_of_the_flat_vectors():
    sets = drawn(3)
    flat = np.stack([np.concatenate([p["a"].numpy().ravel(), p["b"].numpy()]) for p in sets])
    expected = np.linalg.norm(flat - flat.mean(axis=0), axis=1)
    assert distances_to_mean(sets, ["a", "b"]) == pytest.approx(expected)
    assert distance(sets[0], sets[1], ["b"]) == pytest.approx(
        np.linalg.norm((flat[0] - flat[1])[12:])
    )


def test_the_cost_is_exact_where_the_loss_is_a_round_bowl():
    base, tuned = drawn(1, seed=1)[0], drawn(2, seed=2)
    names, kappa = ["a", "b"], 0.7

    def loss(params, t):  # of expert t, with its minimum there
        return 0.2 + kappa / 2 * distance(params, tuned[t], names) ** 2

    mean = {name: (tuned[0][name] + tuned[1][name]) / 2 for name in names}
    to_mean = distances_to_mean(tuned, names)
    for t in range(2):
        gain = loss(base, t) - loss(tuned[t], t)
        to_base = distance(base, tuned[t], names)
        cost = second_order_cost(gain, to_mean=to_mean[t], to_base=to_base)
        assert cost == pytest.approx(loss(mean, t) - loss(tuned[t], t), rel=1e-5)
        # Of two experts it is the bound of an L-smooth loss, L / 8 of their squared distance.
        assert cost == pytest.approx(kappa / 8 * distance(*tuned, names) ** 2, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_unrelated_deltas_of_one_length_stretch_as_the_theory_says(count):
    tuned = [{"a": torch.eye(count)[t]} for t in range(count)]
    stretch = mean_stretch(distances_to_mean(tuned, ["a"]), [1.0] * count)
    assert stretch == pytest.approx(math.sqrt((count - 1) / count))


def test_bases_apart_add_a_quarter_of_their_squared_distance():
    gap, travel = 3.0, 2.0
    tuned = [
        {"a": torch.tensor([travel, 0.0, 0.0])},
        {"a": torch.tensor([0.0, travel, gap])},
    ]
    stretch = mean_stretch(distances_to_mean(tuned, ["a"]), [travel] * 2)
    assert stretch**2 == pytest.approx(0.5 + gap**2 / (4 * travel**2))


def test_an_expert_that_stands_still_stretches_without_end():
    assert mean_stretch([1.0, 1.0], [1.0, 0.0]) == math.inf
    assert mean_stretch([0.0], [0.0]) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gain": -0.1, "to_mean": 1.0, "to_base": 1.0}, "`gain` must be at least 0"),
        ({"gain": 0.1, "to_mean": 1.0, "to_base": 0.0}, "`to_base` must be above 0"),
    ],
)
def test_what_is_no_minimum_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        second_order_cost(**given)
