"""What a search may spend, and what it chooses among."""

import pytest

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.search.tuning.budget import Budget
from mergekit_lit.search.tuning.pool import Candidate, pool_of
from mergekit_lit.search.tuning.space import space_of
from mergekit_lit.search.tuning.trials import Trial


def trials(*images: int) -> list[Trial]:
    return [
        Trial(method="ties", number=i, config={}, state="scored", images=n, seconds=2.0)
        for i, n in enumerate(images)
    ]


def test_another_candidate_must_fit_whole():
    budget = Budget(evaluations=2)
    assert budget.allows([], 80)
    assert budget.allows(trials(80), 80)
    assert not budget.allows(trials(80, 10), 80)
    assert Budget(evaluations=3).allows(trials(80, 10, 40), 80)
    assert Budget(evaluations=1).allows([], 80)


def test_seconds_end_a_search_and_the_first_of_two_budgets_does():
    assert Budget(seconds=5).allows(trials(80, 80), 80)
    assert not Budget(seconds=4).allows(trials(80, 80), 80)
    assert not Budget(seconds=100, evaluations=2).allows(trials(80, 80), 80)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluations": 0}, "`budget` must be at least 1, but is 0"),
        ({"seconds": 0.0}, "`budget_seconds` must be above 0, but is 0.0"),
        ({"seconds": float("inf")}, "`budget_seconds` must be above 0, but is inf"),
    ],
)
def test_no_budget_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Budget(**given).check()


def test_the_pool_holds_the_reference_first_and_each_candidate_once():
    names = ("task_arithmetic", "ties")
    given = {"scale": [0.3, 1.0], "density": [0.1, 0.2]}
    spaces = {name: space_of(MERGE_METHODS.get(name), given=given) for name in names}
    pool = pool_of(spaces, ["recalibrate", "base"])
    assert pool[0] == Candidate("task_arithmetic", {"scale": 0.3}, "recalibrate")
    assert len({each.key for each in pool}) == len(pool) == 2 * (2 + 4)
    alone = pool_of({"ties": spaces["ties"]}, ["base"])
    assert [each.method for each in alone] == ["task_arithmetic", *["ties"] * 4]
