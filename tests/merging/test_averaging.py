"""Averages and arithmetic: laws, the divergence that travel-normalising removes, bad values."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.cards import Card
from mergekit_lit.merging import average, merge, task_arithmetic, travel_normalised
from mergekit_lit.merging.methods.averaging import weighted_average


def with_travels(experts, travels):
    cards = [Card(task=f"task{t}", travel=travel) for t, travel in enumerate(travels)]
    return replace(experts, cards=cards)


def momentum_travel(lr: float, steps: int, momentum: float) -> float:
    """Return eta ||a||_1 of SGD with momentum, summed step by step."""
    return lr * sum((1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps))


def chi2_w(coefficients, travels) -> float:
    """Return chi2(p, w), p equal and w_t ~ lambda_t s_t: how far the merge misses its target."""
    w = torch.as_tensor(coefficients, dtype=torch.float64) * torch.as_tensor(
        travels, dtype=torch.float64
    )
    w = w / w.sum()
    p = torch.full_like(w, 1 / len(w))
    return float(((p - w).square() / w).sum())


# Three experts each of two kinds, and chi2_w of their plain average (theory: 2.025 and so on).
MIXTURES = [
    ([1e-3] * 3 + [1e-2] * 3, 2.025),
    ([1e-3] * 3 + [5e-3] * 3, 0.800),
    ([5e-3] * 3 + [1e-2] * 3, 0.125),
    (
        [momentum_travel(1.0, 1000, 0.9)] * 3 + [momentum_travel(1.0, 4000, 0.9)] * 3,
        0.569,
    ),
]


@pytest.mark.parametrize(("travels", "expected"), MIXTURES)
def test_travel_normalising_removes_the_divergence_of_the_average(make_experts, travels, expected):
    experts = with_travels(make_experts(6), travels)
    assert chi2_w(average(experts), travels) == pytest.approx(expected, abs=5e-4)
    assert chi2_w(travel_normalised(experts), travels) == pytest.approx(0, abs=1e-15)
    assert chi2_w(travel_normalised(experts, scale=2.5), travels) == pytest.approx(0, abs=1e-15)


def test_travel_normalised_follows_the_shares_of_the_target(make_experts):
    experts = with_travels(make_experts(2), [1.0, 3.0])
    coefficients = travel_normalised(experts, weights=[1, 2], scale=0.5)
    # p = (1/3, 2/3), p / s = (1/3, 2/9), which is 3 : 2
    torch.testing.assert_close(coefficients, torch.tensor([0.3, 0.2], dtype=torch.float64))


def test_equal_travels_give_the_plain_average(make_experts):
    experts = with_travels(make_experts(4), [7.0] * 4)
    assert torch.equal(travel_normalised(experts), average(experts))


@pytest.mark.parametrize("size", [1e-310, 1e300])
def test_only_ratios_of_travels_matter(make_experts, size):
    experts = with_travels(make_experts(2), [size, 4 * size])
    expected = torch.tensor([0.8, 0.2], dtype=torch.float64)
    torch.testing.assert_close(travel_normalised(experts), expected)


def test_coefficients_sum_to_what_is_promised(tiny_experts):
    assert float(average(tiny_experts).sum()) == pytest.approx(1)
    assert float(weighted_average(tiny_experts, weights=[3, 0, 5.5]).sum()) == pytest.approx(1)
    assert float(travel_normalised(tiny_experts, scale=1.7).sum()) == pytest.approx(1.7)
    assert task_arithmetic(tiny_experts, scale=0.2).tolist() == [0.2] * 3


def test_large_weights_do_not_overflow(tiny_experts):
    coefficients = weighted_average(tiny_experts, weights=[1e308, 1e308, 0])
    assert coefficients.tolist() == [0.5, 0.5, 0]


def test_average_is_task_arithmetic_of_one_over_t(tiny_experts):
    plain = merge(tiny_experts, "average")
    scaled = merge(tiny_experts, "task_arithmetic", config={"scale": 1 / 3})
    for name, tensor in plain.shared.items():
        assert torch.equal(scaled.shared[name], tensor)


def test_all_weight_on_one_expert_gives_that_expert(tiny_experts):
    merged = merge(tiny_experts, "weighted_average", config={"weights": [0, 1, 0]})
    for name in tiny_experts.merged_names():
        torch.testing.assert_close(
            merged.shared[name], tiny_experts.tuned[1][name], rtol=0, atol=1e-15
        )


def test_scale_zero_is_the_base_to_the_bit(tiny_experts):
    merged = merge(tiny_experts, "task_arithmetic", config={"scale": 0})
    for name, tensor in tiny_experts.base.items():
        assert torch.equal(merged.shared[name], tensor)


BAD = [
    (weighted_average, {"weights": [1, 2]}, "hold one number for each of the 3 experts .*task0"),
    (weighted_average, {"weights": [1, 2, 3, 4]}, "but holds 4"),
    (weighted_average, {"weights": [1, -1, 2]}, "must be at least 0 and not all 0"),
    (weighted_average, {"weights": [0, 0, 0]}, "must be at least 0 and not all 0"),
    (weighted_average, {"weights": []}, "but holds 0"),
    (travel_normalised, {"weights": [1]}, "but holds 1"),
    (travel_normalised, {"scale": -0.1}, "`scale` must be at least 0, but is -0.1"),
    (task_arithmetic, {"scale": -1}, "`scale` must be at least 0, but is -1"),
]


@pytest.mark.parametrize(("method", "config", "message"), BAD)
def test_values_out_of_range(tiny_experts, method, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        method(tiny_experts, **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("travel", "message"),
    [
        (None, "the card of 'task1' has none .adaptive optimizer, or a foreign file"),
        (0.0, "travel of 'task1' must be positive, but its card says 0.0"),
        (float("nan"), "must be positive, but its card says nan"),
        (float("inf"), "must be positive, but its card says inf"),
    ],
)
def test_cards_without_a_travel(tiny_experts, travel, message):
    with pytest.raises(ValueError, match=message):
        travel_normalised(with_travels(tiny_experts, [1.0, travel, 1.0]))
