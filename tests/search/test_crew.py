import os
import time

import pytest

from mergekit_lit.search.crew import Crew, tell


def square(number):
    tell("working on", number)
    return number**2


def process_of(_):
    return os.getpid()


def refuse_three(number):
    if number == 3:
        raise ValueError("`number` must not be 3, but is 3.")
    return number


def test_one_job_works_here_in_order_and_is_heard():
    heard = []
    with Crew(1, listen=heard.append) as crew:
        assert crew.run(square, [3, 1, 2]) == [9, 1, 4]
        assert crew.run(process_of, [0]) == [os.getpid()]
    assert heard == [("working on", 3), ("working on", 1), ("working on", 2)]


def test_nobody_listens_outside_a_crew():
    with Crew(1, listen=lambda message: pytest.fail(str(message))):
        assert square(2) == 4


def test_errors_come_as_they_were_raised():
    with Crew(1) as crew, pytest.raises(ValueError, match="must not be 3"):
        crew.run(refuse_three, [1, 2, 3])


def test_a_crew_needs_someone():
    with pytest.raises(ValueError, match="`jobs` must be at least 1, but is 0"):
        Crew(0)


@pytest.mark.slow
def test_an_error_ends_the_others_at_once_and_a_killed_worker_is_told():
    begun = time.monotonic()
    # Worker processes know the standard library, but not this folder of tests.
    with pytest.raises(ValueError, match="sleep length"), Crew(2) as crew:
        crew.run(time.sleep, [600, -1, 600])
    assert time.monotonic() - begun < 300
    with pytest.raises(ChildProcessError, match="Start again with fewer `jobs`"), Crew(2) as crew:
        crew.run(os._exit, [3])


@pytest.mark.slow
def test_processes_are_heard_and_keep_the_order():
    heard = []
    with Crew(2, listen=heard.append) as crew:
        assert crew.run(abs, [-1, 2, -3]) == [1, 2, 3]
        assert crew.run(tell, ["a", "b", "c"]) == [None] * 3
        with pytest.raises(TypeError):
            crew.run(abs, ["x"])
    assert sorted(heard) == [("a",), ("b",), ("c",)]
