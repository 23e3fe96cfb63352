"""The budget: what trainings cost, how it is shared out, and what is too little."""

import re

import pytest

from mergekit_lit.search.recommending.budget import (
    IN_STEPS,
    Budget,
    Pace,
    Shares,
    least,
    rungs_of,
)
from mergekit_lit.search.recommending.space import Candidate, Space, Way

SPACE = Space(optimizer=["sgd"], lr=[0.01], batch=[32], steps=[50, 100], share=[1.0])


def budget(**changed):
    given = {
        "space": SPACE,
        "tasks": 4,
        "sample": 3,
        "ways": 2,
        "shares": Shares(probe=0.1, confirm=0.2),
        "pace": IN_STEPS,
    }
    return Budget(**given | changed)


def test_a_step_of_64_samples_counts_twice():
    assert IN_STEPS.training(Way("sgd", 0.1, 64, 1.0), 100) == 200


def test_seconds_are_those_of_starts_exports_steps_and_samples():
    pace = Pace(unit="seconds", start=5, export=1, step=0.1, sample=0.01)
    assert pace.training(Way("sgd", 0.1, 10, 1.0), 20, exports=3) == pytest.approx(5 + 2 + 20 * 0.2)


@pytest.mark.parametrize("ways", [1, 2, 3, 5, 8])
def test_the_rounds_of_halving_cost_what_they_may(ways):
    rungs = rungs_of(ways, 60.0)
    before, cost = 0.0, 0.0
    for rung in rungs:
        cost += rung.ways * (rung.cost - before)
        before = rung.cost
    assert cost == pytest.approx(60.0 if ways > 1 else 0.0)
    assert [rung.ways for rung in rungs] == {1: [], 2: [2], 3: [3, 2], 5: [5, 3, 2]}.get(
        ways, [8, 4, 2]
    )


def test_candidates_are_those_whose_whole_training_fits():
    # 4 tasks x 50 steps are 200, x 100 are 400; 0.7 of 500 is 350.
    parts = budget().parts(500)
    assert parts.candidates == (Candidate(SPACE.ways[0], 50),)
    assert [c.steps for c in budget().parts(600).candidates] == [50, 100]


def test_probes_are_as_long_as_their_share_allows():
    assert budget().parts(600).length == 20  # 3 tasks x 20 steps are 60
    assert budget().parts(2400).length == 80
    # Ten steps on three tasks would be 30, on two 20: more tasks go before longer probes.
    few = budget(shares=Shares(probe=0.05, confirm=0.4)).parts(500)
    assert (few.length, few.sample) == (10, 2)


def test_too_small_a_budget_tells_the_smallest_that_does():
    with pytest.raises(ValueError, match="must be at least") as caught:
        budget().parts(10)
    smallest = float(re.search(r"at least (\d+) steps", str(caught.value)).group(1))
    budget().parts(smallest)
    with pytest.raises(ValueError, match="must be at least"):
        budget().parts(0.99 * smallest)


@pytest.mark.parametrize("true", [0.7, 3.0, 99.95, 1234.5, 87_654_321.0])
def test_the_least_is_found_to_three_digits(true):
    found = least(lambda limit: limit >= true)
    assert true <= found <= 1.02 * true


def test_shares_must_leave_a_share():
    with pytest.raises(ValueError, match="must leave a share for training"):
        Shares(probe=0.5, confirm=0.5)
    with pytest.raises(ValueError, match=r"`probe_share` must lie in \(0, 1\)"):
        Shares(probe=0.0)
