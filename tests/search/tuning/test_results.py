"""What a search tells, made of trials that were written by hand."""

from dataclasses import replace

import pytest

from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.results import (
    chosen_of,
    method_results,
    regret,
    results_of,
    trial_rows,
)
from mergekit_lit.search.tuning.space import Axis
from mergekit_lit.search.tuning.trials import Trial, TrialLog


def trial(number, value, state="scored", **more) -> Trial:
    more = {"images": 100, "seconds": 1.0, "by_task": {"a": value}, **more}
    config = {"scale": float(number)}
    return Trial(method="ties", number=number, config=config, state=state, value=value, **more)


TRIALS = [trial(0, 0.5), trial(1, 0.7), trial(2, 0.4, "discarded", images=10, upper=0.6)]


def test_the_regret_counts_from_the_best_of_all():
    assert regret(TRIALS, []) is None
    again = [trial(2, 0.75, again=True, seconds=3.0)]
    told = regret(TRIALS, again)
    assert told["regret"] == pytest.approx(0.05)
    assert (told["best"], told["value"], told["seconds"]) == ({"scale": 2.0}, 0.75, 5.0)
    assert regret(TRIALS, [trial(2, 0.3, again=True)])["regret"] == 0
    assert regret(TRIALS[:2], [])["regret"] == 0


def test_results_of_a_method(tmp_path):
    log = TrialLog(tmp_path / "t", {})
    for each in TRIALS:
        log.add(each)
    told = method_results(log, "ties", {"scale": Axis((0.0, 1.0, 2.0), 0.0)}, 100)
    assert (told["chosen"], told["value"], told["trial"]) == ({"scale": 1.0}, 0.7, 1)
    assert told["defaults"] == {"config": {"scale": 0.0}, "value": 0.5, "state": "scored"}
    assert (told["trials"], told["discarded"], told["failed"]) == (3, 1, 0)
    assert told["images"] == 210
    assert told["saved_share"] == pytest.approx(0.3)
    rows = trial_rows(log)
    assert [row["a"] for row in rows] == [0.5, 0.7, 0.4]
    assert len({tuple(row) for row in rows}) == 1


def test_a_method_without_a_number_is_told(tmp_path):
    log = TrialLog(tmp_path / "t", {})
    log.add(trial(0, None, "failed", by_task={}))
    with pytest.raises(ValueError, match="'ties' must have a candidate whose answers are numbers"):
        method_results(log, "ties", {}, 100)


def test_a_search_to_a_budget_tells_of_the_methods_that_it_tried(tmp_path):
    log = TrialLog(tmp_path / "t", {})
    reference = replace(trial(0, 0.5), method="task_arithmetic", config={"scale": 0.3})
    for each in (reference, trial(0, 0.4, "discarded", images=10, upper=0.45)):
        log.add(each)
    plan = TuningPlan(method=["ties", "dare"], budget=2)
    told = results_of(log, plan, 100)
    assert list(told["methods"]) == ["ties", "task_arithmetic"]
    assert (told["methods"]["ties"]["state"], told["methods"]["ties"]["value"]) == (
        "discarded",
        0.4,
    )
    assert told["methods"]["ties"]["defaults"] is None
    assert (told["spent"]["evaluations"], told["spent"]["trials"]) == (1.1, 2)
    assert told["regret"] is None
    assert chosen_of(log, plan) == reference
    # A trial that was made for the regret's sake alone is never chosen.
    log.add(trial(0, 0.9, again=True))
    assert chosen_of(log, plan) == reference
    assert results_of(log, plan, 100)["regret"]["regret"] == pytest.approx(0.4)
