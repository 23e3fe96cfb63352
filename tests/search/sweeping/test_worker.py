"""Workers: every run once, errors retried or listed, the dead followed, others waited for."""

import json
import os
import signal
import threading

import pytest

from mergekit_lit.core.locks import this_process
from mergekit_lit.search.sweeping import failures, worker
from mergekit_lit.search.sweeping.results import outcome_of, write_table
from mergekit_lit.search.sweeping.worker import work

DEAD = json.dumps({**json.loads(this_process()), "pid": 2**22 + 1, "started": "1"})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(failures, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(worker, "_POLL_S", 0.005)


def heard(sweep, **place):
    told = []
    work(sweep, lambda *message: told.append(message), **place)
    return told


def states(sweep, **place):
    return [state for state, _, _ in heard(sweep, **place) if state != "begun"]


def test_every_run_once_and_none_again(sweep_of):
    sweep = sweep_of({"a": [1, 2], "b": [3, 4]})
    assert states(sweep) == ["done"] * 4
    assert states(sweep) == ["found"] * 4
    assert len(sweep.job.begun) == 4
    rows = write_table(sweep, outcome_of(sweep)).read_text().splitlines()
    assert rows[0] == "run,a,b,sum,file"
    assert rows[1].split(",")[1:4] == ["1.0", "3", "4.0"]
    assert not list(sweep.out.rglob("claim.*"))


def test_each_worker_begins_in_another_part(sweep_of):
    sweep = sweep_of({"b": [0, 1, 2, 3]})
    work(sweep, lambda *_: None, place=1, workers=2)
    assert [config["b"] for config in sweep.job.begun] == [2, 3, 0, 1]


def test_two_launches_at_once_do_no_run_twice(sweep_of, sums):
    job = sums()
    launches = [sweep_of({"b": list(range(100))}, job) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(sweep, print)) for sweep in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(config["b"] for config in job.begun) == list(range(100))


def test_passing_errors_are_tried_again(sweep_of, sums):
    job = sums(errors={1: [OSError("the disk is busy"), RuntimeError("out of memory")]})
    sweep = sweep_of({"b": [1, 2]}, job, retries=2)
    assert states(sweep) == ["done", "done"]
    assert [config["b"] for config in job.begun] == [1, 2, 1, 1]
    assert not list(sweep.out.rglob("failure.json"))


def test_failures_are_told_and_the_sweep_goes_on(sweep_of, sums):
    errors = {1: [OSError("disk")] * 9, 2: [ValueError("`lr` must\n be positive.")] * 9}
    job = sums(errors=errors)
    sweep = sweep_of({"b": [1, 2, 3]}, job, retries=1)
    told = {error for state, _, error in heard(sweep) if state == "failed"}
    assert told == {"disk", "`lr` must be positive."}
    assert [config["b"] for config in job.begun].count(1) == 2
    assert [config["b"] for config in job.begun].count(2) == 1
    outcome = outcome_of(sweep)
    assert set(outcome.failed.values()) == told
    assert [dict(run.changes) for run in outcome.done] == [{"b": 3}]
    trace = json.loads(next(sweep.out.rglob("failure.json")).read_text())["trace"]
    assert "Traceback" in trace
    # The next launch tries again.
    errors.clear()
    again = sweep_of({"b": [1, 2, 3]}, job, begun=failures.time.time() + 1)
    assert sorted(states(again)) == ["done", "done", "found"]


def test_two_launches_at_once_count_failures_together(sweep_of, sums):
    """Each goes back to the run as soon as the other has left it: no run is tried for ever."""
    job = sums(errors={1: [OSError("disk")] * 99})
    launches = [sweep_of({"b": [1]}, job, retries=3, begun=begun) for begun in (0.0, 1.0)]
    run = launches[0].plan.runs[0]
    for _ in range(200):
        for sweep in launches:
            worker._attempt(sweep, [run], None, print)
        failures.time.sleep(0.001)
    assert len(job.begun) == 4
    assert failures.failure_of(launches[0].folder(run)).attempts == 4


def test_a_second_launch_waits_as_long_as_the_first(sweep_of, sums, monkeypatch):
    monkeypatch.setattr(failures, "_BACKOFF_S", 100)
    job = sums(errors={1: [OSError("disk")]})
    first, second = (sweep_of({"b": [1]}, job, begun=begun) for begun in (0.0, 2**32))
    (run,) = first.plan.runs
    assert worker._attempt(first, [run], None, print) == {run.name: "later"}
    assert worker._attempt(second, [run], None, print) == {run.name: "later"}
    monkeypatch.setattr(failures.time, "time", lambda: 2**32)
    assert worker._attempt(second, [run], None, print) == {run.name: "done"}


def test_the_backoff_doubles_and_ends():
    kept = None
    waits = []
    for _ in range(12):
        kept = failures.failure_after(OSError("x"), kept, retries=11)
        if kept.due:
            waits.append(kept.due - failures.time.time())
    assert len(waits) == 11
    assert waits[3] == pytest.approx(8 * waits[0], rel=0.2)
    assert kept.due is None
    assert kept.attempts == 12


def test_the_run_of_a_dead_worker_is_followed_but_not_for_ever(sweep_of):
    sweep = sweep_of({"b": [1, 2]}, retries=2)
    for run, deaths in zip(sweep.plan.runs, (2, 3), strict=True):
        for number in range(1, deaths + 1):
            folder = sweep.folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"claim.{number}").write_text(DEAD)
    assert states(sweep) == ["done", "failed"]
    assert "died 3 times" in next(iter(outcome_of(sweep).failed.values()))


def test_runs_of_others_are_waited_for(sweep_of):
    sweep = sweep_of({"b": [1]})
    folder = sweep.folder(sweep.plan.runs[0])
    folder.mkdir(parents=True)
    claim = folder / "claim.1"
    claim.write_text(this_process())
    threading.Timer(0.1, claim.write_text, [DEAD]).start()
    assert states(sweep) == ["done"]


def test_sigterm_gives_the_claim_back(sweep_of, sums, monkeypatch):
    job = sums()
    sweep = sweep_of({"b": [1]}, job)
    monkeypatch.setattr(job, "execute", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        work(sweep, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(sweep.out.rglob("claim.*"))
