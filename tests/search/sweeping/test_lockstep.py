"""Crews of a sweep: who is done at once with whom, what is kept of it, and failures kept apart."""

import json
from dataclasses import dataclass, replace

import pytest

from mergekit_lit.search.sweeping import failures, worker
from mergekit_lit.search.sweeping.jobs import Alike
from mergekit_lit.search.sweeping.lockstep import Finding, crews, findings, obstacles
from mergekit_lit.search.sweeping.plan import Run
from mergekit_lit.search.sweeping.results import outcome_of
from mergekit_lit.search.sweeping.worker import work


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(failures, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(worker, "_POLL_S", 0.005)


@pytest.fixture
def paired(sums):
    """A job whose runs of one `a` are done at once, and gain by it where `gains` says so."""

    @dataclass
    class Paired(sums):
        gains: bool | None = None
        refusal: str = ""

        def alike(self, config):
            if config["a"] < 0:
                return Alike(obstacle="`a` is negative", may_pay=True)
            return Alike(kind=str(config["a"]), execute=self.at_once, may_pay=True)

        def at_once(self, tasks, pace):
            self.begun.append([config["b"] for config, _, _ in tasks])
            if self.gains is not None and pace.together is None:
                pace.alone_s, pace.together_s = [2.0], [1.0 if self.gains else 3.0]
                pace.together = self.gains
            if self.refusal:
                pace.refuse(self.refusal)
            return [self.error_of(task) for task in tasks]

        def error_of(self, task):
            try:
                self.execute(*task)
            except Exception as error:
                return error
            return None

    return Paired


def at_once(job):
    return [each for each in job.begun if isinstance(each, list)]


def test_crews_hold_runs_of_one_kind_in_their_order():
    runs = [Run(name, 0, {}) for name in "abcdefg"]
    kinds = {name: Alike(kind="x" if name in "ace" else "y") for name in "abcdef"}
    found = crews(runs, kinds, lambda run, _: run.name != "b", size=2)
    assert ["".join(run.name for run in crew) for crew in found] == ["ac", "b", "df", "e", "g"]
    alone = crews(runs, kinds, lambda *_: True, size=1)
    assert [len(crew) for crew in alone] == [1] * 7


def test_runs_of_a_kind_are_done_at_once(sweep_of, paired):
    job = paired(gains=True)
    sweep = sweep_of({"a": [1, 2, -1], "b": list(range(10))}, job, lockstep="auto")
    work(sweep, lambda *_: None)
    assert sorted(map(len, at_once(job))) == [2, 2, 8, 8]
    assert len(outcome_of(sweep).done) == 30
    kept = findings(sweep.out)
    assert kept == [Finding(device="cpu", members=8, together=True, alone_s=2, together_s=1)] * 2
    assert str(kept[0]) == (
        "In lockstep on cpu: a step of 8 runs took 1000.0 ms, and 2000.0 ms one by one."
    )
    assert obstacles(sweep) == ["Not in lockstep, but one by one: `a` is negative."]
    assert obstacles(replace(sweep, lockstep="never")) == []


def test_no_worker_is_left_without_runs(sweep_of, paired):
    job = paired(gains=True)
    work(sweep_of({"b": list(range(12))}, job, lockstep="auto"), lambda *_: None, workers=4)
    assert set(map(len, at_once(job))) == {3}


@pytest.mark.parametrize("why", [{"gains": False}, {"refusal": "dropout"}])
def test_what_does_not_gain_is_done_alone_from_then_on(why, sweep_of, paired):
    job = paired(**why)
    sweep = sweep_of({"b": list(range(20))}, job, lockstep="auto")
    work(sweep, lambda *_: None)
    assert len(at_once(job)) == 1
    assert len(outcome_of(sweep).done) == 20
    assert "Not in lockstep" in str(findings(sweep.out)[0])


def test_always_and_never(sweep_of, paired, tmp_path):
    for mode, crewed in (("always", 2), ("never", 0)):
        job = paired(gains=False)
        sweep = sweep_of({"b": list(range(16))}, job, out=tmp_path / mode, lockstep=mode)
        work(sweep, lambda *_: None)
        assert len(at_once(job)) == crewed


def test_a_failure_is_that_of_one_run_which_is_tried_again_alone(sweep_of, paired):
    job = paired(gains=True, errors={1: [OSError("disk"), OSError("disk")], 2: [ValueError("b")]})
    sweep = sweep_of({"b": [0, 1, 2, 3]}, job, lockstep="auto")
    work(sweep, lambda *_: None)
    assert at_once(job) == [[0, 1, 2, 3]]
    outcome = outcome_of(sweep)
    assert [dict(run.changes).get("b", 0) for run in outcome.done] == [0, 1, 3]
    assert list(outcome.failed.values()) == ["b"]
    assert not list(sweep.out.rglob("claim.*"))


def test_those_that_died_once_are_done_alone(sweep_of, paired):
    job = paired(gains=True)
    sweep = sweep_of({"b": [0, 1, 2]}, job, lockstep="auto")
    folder = sweep.folder(sweep.plan.runs[1])
    folder.mkdir(parents=True)
    dead = {"host": "elsewhere", "pid": 1, "started": "1"}
    (folder / "claim.1").write_text(json.dumps(dead))
    sweep = replace(sweep, silent_s=0)
    work(sweep, lambda *_: None)
    assert at_once(job) == [[0, 2]]
    assert len(outcome_of(sweep).done) == 3
