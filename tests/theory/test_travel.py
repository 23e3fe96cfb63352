import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lit.theory.travel import (
    Travel,
    WeightedSquares,
    WeightedSum,
    decayed_share,
    effective_steps,
    sgd_rule,
    step_l1,
    step_l2_squared,
)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1000, 9910), (2000, 19910), (3000, 29910), (4000, 39910)]
)
def test_momentum_travels_as_the_theory_says(steps, expected):
    assert step_l1(steps, momentum=0.9) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 7, 300])
def test_closed_forms_are_the_sums_of_the_weights(steps, momentum):
    a = (1 - momentum ** (steps - np.arange(steps))) / (1 - momentum)
    assert step_l1(steps, momentum=momentum) == pytest.approx(a.sum(), rel=1e-12)
    assert step_l2_squared(steps, momentum=momentum) == pytest.approx((a**2).sum(), rel=1e-12)
    weights = effective_steps([sgd_rule(1.0, momentum=momentum)] * steps)
    np.testing.assert_allclose(weights.numpy(), a, rtol=1e-12)


def weights_of_torch(settings_by_step, **fixed):
    """Weight of each gradient in the displacement, read off torch.optim.SGD with unit gradients."""
    count = len(settings_by_step)
    x = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.5, **fixed)
    for step, (lr, momentum) in enumerate(settings_by_step):
        optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        x.grad = torch.zeros_like(x)
        x.grad[step] = 1.0
        optimizer.step()
    return -x.detach()


@pytest.mark.parametrize("fixed", [{}, {"dampening": 0.3}, {"nesterov": True}])
def test_weights_equal_what_torch_does_under_any_schedule(fixed):
    draw = np.random.default_rng(0)
    schedule = [(float(lr), float(rho)) for lr, rho in draw.uniform(0.01, 0.95, (25, 2))]
    rules = [
        sgd_rule(lr, momentum=rho, first=k == 0, **fixed) for k, (lr, rho) in enumerate(schedule)
    ]
    torch.testing.assert_close(effective_steps(rules), weights_of_torch(schedule, **fixed))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 3), st.booleans()),
        min_size=1,
        max_size=20,
    ),
    st.floats(0, 0.9),
)
def test_running_sums_equal_the_sums_of_the_finished_run(run, dampening):
    total, squares = WeightedSum(), WeightedSquares()
    rules, values = [], []
    for step, (lr, momentum, value, nesterov) in enumerate(run):
        rule = sgd_rule(
            lr, momentum=momentum, dampening=dampening, nesterov=nesterov, first=step == 0
        )
        total, squares = total.advance(value, rule), squares.advance(value, rule)
        rules.append(rule)
        values.append(value)
        weights = effective_steps(rules).numpy()  # all of them change with each step
        assert total.total == pytest.approx((weights * values).sum(), rel=1e-9, abs=1e-12)
        assert squares.total == pytest.approx((weights**2 * values).sum(), rel=1e-9, abs=1e-12)


def test_travel_gathers_the_weights_their_squares_and_the_drift():
    rules = [sgd_rule(lr, momentum=0.9) for lr in (0.1, 0.2, 0.05)]
    travel, away = Travel(), [0.0, 1.0, 4.0]
    for rule, square in zip(rules, away, strict=True):
        travel = travel.advance(rule, displacement_squared=square)
    weights = effective_steps(rules).numpy()
    assert travel.weights.total == pytest.approx(weights.sum())
    assert travel.squares.total == pytest.approx((weights**2).sum())
    assert travel.drift.total == pytest.approx((weights * away).sum())


def test_decoupled_decay_takes_the_share_that_adamw_takes():
    x = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=0.5)
    share = 0.0
    for _ in range(5):
        x.grad = torch.zeros_like(x)
        optimizer.step()
        share = decayed_share(share, lr=0.1, weight_decay=0.5)
    assert float(x.detach()) == pytest.approx(2.0 * (1 - share), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "momentum", "message"),
    [(-1, 0.9, "`steps` must be at least 0"), (5, 1.0, r"`momentum` must lie in \[0, 1\)")],
)
def test_arguments_out_of_range_are_refused(steps, momentum, message):
    with pytest.raises(ValueError, match=message):
        step_l1(steps, momentum=momentum)
    with pytest.raises(ValueError, match=message):
        step_l2_squared(steps, momentum=momentum)
