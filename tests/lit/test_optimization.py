import math

import pytest
import torch
from torch import nn

from mergekit_lit.lit.optimization import Optimization

PLAIN = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_steps": 4,
}


def make(**changes):
    return Optimization(**{**PLAIN, **changes})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
    ],
)
def test_rates_follow_the_equation(schedule, expected):
    # The warm-up ends with a factor of 1 at k = w - 1, and the decay starts with 1 at k = w.
    rates = make(schedule=schedule)
    assert [rates.factor(step, 8) for step in range(8)] == pytest.approx(expected, abs=1e-12)


def test_the_scheduler_sets_the_rate_of_each_step():
    rates, weight = make(schedule="linear"), nn.Parameter(torch.zeros(1))
    optimizer = rates.build([weight])
    scheduler = rates.scheduler(optimizer, 8)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"] / 0.1)
        weight.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([rates.factor(step, 8) for step in range(8)])
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.9), "weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9), "weight_decay": 0.01}),
    ],
)
def test_builds_the_optimizer_of_the_name(name, kind, options):
    built = make(optimizer=name, betas=(0.8, 0.9), weight_decay=0.01)
    optimizer = built.build([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in options} == options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": math.nan}, "`lr` must be positive and finite, but is nan"),
        ({"lr": math.inf}, "`lr` must be positive"),
        ({"momentum": 1.0}, r"`momentum` must lie in \[0, 1\), but is 1.0"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0"),
        ({"optimizer": "sdg"}, "No optimizer named 'sdg'. Did you mean 'sgd'?"),
        ({"schedule": "cosin"}, "No schedule named 'cosin'. Did you mean 'cosine'?"),
    ],
)
def test_refuses_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_refuses_a_warm_up_that_leaves_no_step():
    optimizer = make().build([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="`warmup_steps` must be less than the number of steps 4"):
        make().scheduler(optimizer, 4)


def test_the_default_warm_up_yields_to_few_steps():
    rates = make(warmup_steps=None)
    assert [rates.warmup(steps) for steps in (1, 3, 39, 40, 500)] == [0, 1, 19, 20, 20]
    assert rates.factor(0, 1) == 1
    assert rates.factor(0, 4) == 0.5
