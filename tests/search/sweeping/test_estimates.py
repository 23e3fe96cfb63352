"""Estimates: what is left, and what it costs, by trials and by what is finished."""

import pytest

from mergekit_lit.core.records import Record
from mergekit_lit.search.sweeping.estimates import estimate
from mergekit_lit.search.sweeping.worker import work

AXES = {"a": [1, 2, 3], "path": ["constant", "cosine"], "steps": [10, 20]}


def test_a_trial_of_each_kind_tells_hours_and_disk(sweep_of, sums):
    job = sums()
    found = estimate(sweep_of(AXES, job))
    assert (found.runs, found.results, found.shared, found.left) == (9, 12, 3, 9)
    assert job.trials == 2
    # 3 runs of 20 constant steps; 3 of 10 and 3 of 20 cosine steps; a start each.
    seconds = 9 * 36 + 3 * 20 * 3.6 + 3 * 10 * 7.2 + 3 * 20 * 7.2
    assert found.core_hours == pytest.approx(seconds / 3600)
    assert found.gpu_hours == 0
    assert found.disk_mb == pytest.approx(12)


@pytest.mark.parametrize(("gpu", "hours"), [(False, 100 / 3600), (True, 300 / 3600)])
def test_what_is_finished_tells_more_than_a_trial(sweep_of, sums, gpu, hours):
    job = sums(gpu=gpu)
    half = sweep_of({**AXES, "a": [1], "path": ["constant"]}, job)
    work(half, lambda *_: None)
    (run,) = half.plan.runs
    record = Record(stage="train", name="x", config={}, seconds=300.0, cpu_seconds=100.0)
    record.write(half.folder(run) / "x.record.json")
    found = estimate(sweep_of({**AXES, "path": ["constant"]}, job))
    assert (found.runs, found.left, job.trials) == (3, 2, 0)
    assert found.core_hours == pytest.approx(2 * hours)
    assert found.gpu_hours == pytest.approx(2 * hours if gpu else 0)
    assert found.source == "what is finished"


def test_nothing_is_told_where_nothing_is_known(sweep_of, sums):
    sweep = sweep_of({"a": [1]}, sums(cost=False))
    assert estimate(sweep).core_hours is None
    work(sweep, lambda *_: None)
    done = estimate(sweep)
    assert (done.left, done.core_hours, done.disk_mb) == (0, 0.0, 0.0)
