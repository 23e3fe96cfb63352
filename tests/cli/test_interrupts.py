"""Ctrl-C, as a terminal sends it to every process of a command: it ends soon and leaves no mess."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OURS = [sys.executable, "-m", "mergekit_lit"]
# About two seconds on idle cores; a busy machine takes longer.
LONGEST_S = 20.0
ENDLESS = 10**6


def quickstart(suite: str, out: Path, jobs: int) -> list[str]:
    words = [f"--suite={suite}", f"--out={out}", "--backbone=resnet@random:0", f"--jobs={jobs}"]
    return ["quickstart", *words, f"--steps={ENDLESS}"]


def train(suite: str, out: Path, *more: str) -> list[str]:
    words = [f"--data.suite={suite}", f"--out={out}", "--model.base=vit@random:0"]
    words += ["--model.image_size=8", "--data.reserve=4", "--trainer.accelerator=cpu"]
    # A checkpoint is being written at nearly every moment.
    return ["train", *words, f"--steps={ENDLESS}", "--checkpoint_every=1", *more]


COMMANDS = {
    "quickstart of one process": lambda suite, out: quickstart(suite, out, 1),
    "quickstart of workers": lambda suite, out: quickstart(suite, out, 2),
    "train": lambda suite, out: train(suite, out, "--data.task=dots"),
    "train side by side": lambda suite, out: train(suite, out, "--data.task=all", "--jobs=2"),
    "train in two processes": lambda suite, out: train(
        suite, out, "--data.task=dots", "--trainer.devices=2"
    ),
    "run": lambda suite, out: ["run", "--devices=2", *train(suite, out, "--data.task=dots")],
}


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background may have them ignore Ctrl-C, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*OURS, *words], start_new_session=True, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(found, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if found() or process.poll() is not None:
            return
        time.sleep(0.1)


def living(session: int) -> str:
    """The processes of a session that still run."""
    listed = ["ps", "-o", "stat=,args=", "-s", str(session)]
    lines = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.splitlines()
    # One whose name is in brackets has let go of its memory already.
    gone = ("Z", "[")
    return "\n".join(
        line for line in lines if not any(w.startswith(gone) for w in line.split()[:2])
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_everything_at_once(name, tiny_suite, tmp_path):
    process = start(COMMANDS[name](tiny_suite, tmp_path))
    wait_for(lambda: list(tmp_path.rglob("metrics.jsonl")), process)
    assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    begun = time.monotonic()
    told = process.communicate(timeout=120)[1]
    assert time.monotonic() - begun < LONGEST_S
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert told.strip().endswith("mergekit-lit: interrupted")
    assert told.count("interrupted") == 1
    time.sleep(0.5)
    assert living(process.pid) == ""
    assert not list(tmp_path.rglob(".*"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_workers_do_not_outlive_a_command_that_is_killed(tiny_suite, tmp_path):
    process = start(quickstart(tiny_suite, tmp_path, 2))
    wait_for(lambda: list(tmp_path.rglob("metrics.jsonl")), process)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not living(process.pid), process)
    time.sleep(3)
    assert living(process.pid) == ""
