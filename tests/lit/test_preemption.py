"""Signals that tell a process to end: when it does, by which code, and who else is told."""

import os
import signal
import threading

import pytest

from mergekit_lit.lit.preemption import hold, leave_if_told, preemptible


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Checks that every block leaves the handlers as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def leaving(work, advice=""):
    """Return how a block of that work is left."""
    with pytest.raises(SystemExit) as caught:
        preemptible(advice)(work)()
    return caught.value


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGUSR2", 75)])
def test_a_block_ends_at_once_with_a_code_and_a_word(name, code):
    done = []

    def work():
        tell(getattr(signal, name))
        done.append("more")

    request = leaving(work, "Do it again.")
    assert request.code == code
    assert request.__notes__ == [f"Ended by {name}.", "Do it again."]
    assert not done


def test_what_a_block_was_told_is_forgotten_after_it():
    leaving(tell)
    leave_if_told()


def test_what_is_held_ends_where_it_allows_it():
    done = []

    def work():
        hold()
        tell()
        tell(signal.SIGUSR1)
        done.append("held")
        leave_if_told()
        done.append("more")

    assert leaving(work).code == 143
    assert done == ["held"]


def test_an_inner_block_is_finished_and_the_outer_one_left():
    done = []

    @preemptible("inner")
    def inner():
        hold()
        tell(signal.SIGUSR1)
        done.append("inner")

    def outer():
        inner()
        done.append("outer")

    request = leaving(outer, "outer")
    assert done == ["inner", "outer"]
    assert (request.code, request.__notes__[1:]) == (75, ["outer"])
    with pytest.raises(SystemExit) as caught:
        inner()
    assert caught.value.__notes__[1:] == ["inner"]


def test_leaving_is_not_disturbed_by_further_signals():
    done = []

    def work():
        try:
            tell()
        finally:
            tell(signal.SIGUSR1)
            tell()
            done.append("put away")

    assert leaving(work).code == 143
    assert done == ["put away"]


def test_a_handler_that_was_there_is_called_afterwards():
    told, before_leaving = [], []

    def work():
        hold()
        tell(signal.SIGUSR2)
        before_leaving.append(list(told))
        leave_if_told()

    before = signal.signal(signal.SIGUSR2, lambda number, _: told.append(number))
    try:
        assert leaving(work).code == 75
        tell(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert before_leaving == [[]]
    assert told == [signal.SIGUSR2, signal.SIGUSR2]


def test_what_is_to_be_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with preemptible():
            tell(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_error_goes_on_as_it_is():
    @preemptible("again")
    def work():
        hold()
        tell()
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        work()
    with preemptible():
        leave_if_told()


def test_other_threads_watch_nothing():
    done = []

    def work():
        with preemptible():
            hold()
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGTERM)]
