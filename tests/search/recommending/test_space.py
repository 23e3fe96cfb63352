"""The space: combinations, probes, and what is no space."""

import pytest

from mergekit_lit.search.recommending.space import Space, Way


def test_every_combination_is_a_candidate():
    space = Space(
        optimizer=["sgd", "adamw"], lr=[0.1, 0.2], adam_lr=[0.01], batch=[4], steps=[5, 20]
    )
    assert len(space.ways) == 3 * 1 * 2
    assert len(space.candidates) == 12
    assert len({way.name for way in space.ways}) == 6


def test_one_way_of_each_rate_is_probed_with_the_middle_batch_and_most_images():
    space = Space(optimizer=["sgd"], lr=[0.2, 0.1], batch=[128, 8, 32], share=[0.5, 1.0])
    assert space.probes == [Way("sgd", 0.1, 32, 1.0), Way("sgd", 0.2, 32, 1.0)]


def test_rates_warm_up_and_stay():
    assert Space(warmup_steps=4).factors(6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    # Half-way through the warm-up a training looks as it does on its way to more steps.
    assert Space(warmup_steps=4).factors(2) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": []}, "`space.lr` must hold a value"),
        ({"lr": [0.0]}, "`space.lr` must be positive"),
        ({"batch": [0]}, "`space.batch` must be at least 1"),
        ({"share": [1.5]}, "`space.share` must lie in"),
        ({"optimizer": ["sdg"]}, "Did you mean 'sgd'"),
        ({"steps": [5], "warmup_steps": 5}, "`space.warmup_steps` must be"),
    ],
)
def test_what_is_no_space_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Space(**given)
