"""Claims: one holder at a time, takeovers of the dead and the silent, no race between two."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from mergekit_lit.core.locks import this_process
from mergekit_lit.search.sweeping.claims import held, take

DEAD = {"pid": 2**22 + 1, "started": "1"}


def elsewhere() -> str:
    return json.dumps({**json.loads(this_process()), "host": "another machine"})


def leave_claim(folder, number=1, text=None, age_s=0.0):
    folder.mkdir(exist_ok=True)
    path = folder / f"claim.{number}"
    path.write_text(text or json.dumps({**json.loads(this_process()), **DEAD}))
    if age_s:
        then = time.time() - age_s
        os.utime(path, (then, then))
    return path


def test_one_at_a_time_and_the_next_when_it_is_given_back(tmp_path):
    folder = tmp_path / "run"
    claim = take(folder)
    assert claim is not None
    assert take(folder) is None
    claim.release()
    assert not list(folder.glob("claim.*"))
    assert take(folder) is not None


def test_of_many_at_once_one_gets_it(tmp_path):
    for folder in (tmp_path / "fresh", tmp_path / "dead"):
        if folder.name == "dead":
            leave_claim(folder)
        gate = threading.Barrier(16)

        def grab(_, folder=folder, gate=gate):
            gate.wait()
            return take(folder)

        with ThreadPoolExecutor(16) as pool:
            taken = [claim for claim in pool.map(grab, range(16)) if claim]
        assert len(taken) == 1


def test_the_dead_of_this_machine_are_followed_at_once(tmp_path):
    leave_claim(tmp_path / "run")
    claim = take(tmp_path / "run")
    assert claim is not None
    assert claim.number == 2
    assert claim.deaths(0.0) == 1
    claim.release()
    assert not list((tmp_path / "run").glob("claim.*"))


def test_deaths_before_the_launch_do_not_count_and_those_in_others_do(tmp_path):
    leave_claim(tmp_path / "run", 1, age_s=50)
    leave_claim(tmp_path / "run", 2)
    claim = take(tmp_path / "run")
    assert claim is not None
    assert claim.deaths(time.time() - 10) == 1
    assert claim.deaths(0.0) == 2


def test_holders_elsewhere_are_followed_when_they_are_silent_for_long(tmp_path):
    leave_claim(tmp_path / "fresh", text=elsewhere(), age_s=50)
    leave_claim(tmp_path / "silent", text=elsewhere(), age_s=500)
    leave_claim(tmp_path / "torn", text="{", age_s=500)
    assert take(tmp_path / "fresh") is None
    assert take(tmp_path / "silent") is not None
    assert take(tmp_path / "torn") is not None


def test_a_holder_gives_signs_of_life(tmp_path):
    claim = take(tmp_path / "run")
    assert claim is not None
    os.utime(claim.path, (1, 1))
    with held(claim, lambda: None, beat_s=0.01):
        deadline = time.monotonic() + 5
        while claim.path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claim.path.stat().st_mtime > 2
    assert not claim.path.exists()


def test_a_slow_holder_hears_that_it_was_followed(tmp_path):
    claim = take(tmp_path / "run")
    assert claim is not None
    lost = threading.Event()
    with held(claim, lost.set, beat_s=0.01):
        later = leave_claim(tmp_path / "run", 2, text=this_process())
        assert lost.wait(5)
    assert not claim.path.exists()
    assert later.exists()


def test_a_claim_whose_predecessor_gave_back_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Between looking and making the file another process took over, ended, and gave back."""
    from mergekit_lit.search.sweeping import claims

    dead = leave_claim(tmp_path / "run")
    create = claims.create_text

    def slowly(path, text):
        dead.unlink()
        create(path, text)

    monkeypatch.setattr(claims, "create_text", slowly)
    assert take(tmp_path / "run") is None
    assert not list((tmp_path / "run").glob("claim.*"))
