"""Locks: one process at a time, whatever became of the one before."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from contextlib import ExitStack, contextmanager, suppress

import pytest

from mergekit_lit.core import locks
from mergekit_lit.core.locks import sole_writer

# A number that no process has: Linux gives smaller ones.
NONE = 2**22 + 1

# Takes the lock when told to, says whether it has it, and holds it until told again.
CONTENDER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from mergekit_lit.core.locks import sole_writer

    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with sole_writer(Path(sys.argv[1])):
            print("held", flush=True)
            sys.stdin.readline()
    except ValueError:
        print("refused", flush=True)
        sys.stdin.readline()
    """
)


@contextmanager
def contenders(lock, count):
    """Other processes that want the lock, and are ready to take it."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            command = [sys.executable, "-c", CONTENDER, str(lock)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            found.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in found:
            assert process.stdout.readline() == "ready\n"
        yield found


def go(processes):
    for process in processes:
        process.stdin.write("\n")


def answers(processes):
    return sorted(process.stdout.readline().strip() for process in processes)


def test_a_second_process_is_refused_and_the_lock_of_a_killed_one_is_taken_over(tmp_path):
    lock = tmp_path / "lock"
    with contenders(lock, 1) as (holder,):
        go([holder])
        assert answers([holder]) == ["held"]
        told = rf"but process {holder.pid} on '{platform.node()}' is at it.*delete '{lock}'"
        with pytest.raises(ValueError, match=told), sole_writer(lock):
            pass
        holder.kill()
        # Not waited for: what is left of a killed process until then holds nothing.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with sole_writer(lock):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_it_goes_with_the_block_and_leaves_no_empty_folder(tmp_path):
    lock = tmp_path / "a" / "b" / "lock"
    with suppress(KeyError), sole_writer(lock):
        assert lock.is_file()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with sole_writer(lock):
        (lock.parent / "result").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["result"]


def test_one_process_does_not_hold_it_twice(tmp_path):
    lock = tmp_path / "lock"
    with sole_writer(lock):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on"), sole_writer(lock):
            pass
        assert lock.is_file()


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"pid": NONE}, True),
        ({"started": "1"}, True),  # the number came back to another process
        ({"started": ""}, False),
        ({"pid": NONE, "host": "elsewhere"}, False),
        ({"pid": NONE, "namespace": "another container"}, False),
        ({"boot": "before the machine was started anew"}, True),
        ({"pid": NONE, "boot": "another", "machine": "another of the same name"}, False),
        ({"pid": NONE, "boot": ""}, False),
    ],
)
def test_only_one_that_is_surely_dead_is_overruled(tmp_path, change, free, monkeypatch):
    lock = tmp_path / "lock"
    monkeypatch.setattr(locks, "_MACHINE", tmp_path / "machine-id")
    (tmp_path / "machine-id").write_text("0123abc\n")
    with sole_writer(lock):
        mine = json.loads(lock.read_text())
    left = json.dumps(mine | change)
    lock.write_text(left)
    if free:
        with sole_writer(lock):
            assert json.loads(lock.read_text()) == mine
        return
    with pytest.raises(ValueError, match="must be written by one process"), sole_writer(lock):
        pass
    assert lock.read_text() == left


def test_where_machines_have_no_number_another_start_may_be_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_MACHINE", tmp_path / "none")
    mine = json.loads(locks.this_process())
    assert locks.is_of_dead(json.dumps(mine | {"pid": NONE}))
    assert not locks.is_of_dead(json.dumps(mine | {"pid": NONE, "boot": "another"}))


@pytest.mark.parametrize("text", ["", '{"host": "a', "[]", "{}"])
def test_what_cannot_be_read_is_held(tmp_path, text):
    lock = tmp_path / "lock"
    lock.write_text(text)
    with pytest.raises(ValueError, match="another process is at it"), sole_writer(lock):
        pass


def test_of_several_that_find_a_dead_lock_at_once_one_gets_it(tmp_path):
    lock, count = tmp_path / "lock", 4
    with sole_writer(lock):
        left = json.loads(lock.read_text())
    lock.write_text(json.dumps(left | {"pid": NONE}))
    with contenders(lock, count) as processes:
        go(processes)
        assert answers(processes) == ["held"] + ["refused"] * (count - 1)


def test_a_holder_that_ends_meanwhile_leaves_the_lock_free(tmp_path, monkeypatch):
    lock, create = tmp_path / "lock", locks.create_text
    tries = []

    def gone_when_looked_at(path, text):
        tries.append(path)
        if len(tries) == 1:
            raise FileExistsError
        create(path, text)

    monkeypatch.setattr(locks, "create_text", gone_when_looked_at)
    with sole_writer(lock):
        assert lock.is_file()
