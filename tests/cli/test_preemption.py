"""Commands that are told to end: what was done is kept, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

pytestmark = pytest.mark.slow

STEPS = 200


def flags(suite):
    return [
        f"--data.suite={suite}",
        "--data.task=dots",
        "--data.reserve=4",
        "--model.base=vit@random:0",
        "--model.image_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        f"--steps={STEPS}",
    ]


def start(*words):
    command = [sys.executable, "-m", "mergekit_lit", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, env=environment, **pipes)


def end_of(process):
    """What a process has said on stderr when it has ended."""
    return process.communicate(timeout=500)[1]


def wait_for(found, process):
    for _ in range(3000):
        if found() or process.poll() is not None:
            return
        time.sleep(0.05)


def living(session):
    listed = ["ps", "-o", "stat=,args=", "-s", str(session)]
    lines = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.splitlines()
    # One whose name is in brackets has let go of its memory already.
    gone = ("Z", "[")
    return [line for line in lines if not any(w.startswith(gone) for w in line.split()[:2])]


@pytest.fixture(scope="module")
def whole(tiny_suite, tmp_path_factory):
    """The files of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    process = start("train", *flags(tiny_suite), f"--out={folder}")
    told = end_of(process)
    assert process.returncode == 0, told
    return folder


WAYS = {
    "one process": ([], "SIGTERM", 143),
    "its time is over": ([], "SIGUSR1", 75),
    "two processes": (["--trainer.devices=2"], "SIGTERM", 143),
    "run": (["run", "--devices=2", "--accelerator=cpu"], "SIGUSR1", 75),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_training_keeps_its_last_step_and_goes_on(name, tiny_suite, tmp_path, whole):
    words, sent, code = WAYS[name]
    command = [*words, "train"] if words[:1] == ["run"] else ["train", *words]
    command += [*flags(tiny_suite), f"--out={tmp_path}"]
    process = start(*command)
    log = tmp_path / "logs/dots/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 10, process)
    # One process is told; where there are others, it tells them.
    process.send_signal(getattr(signal, sent))
    told = end_of(process)
    assert process.returncode == code, told
    (line,) = told.splitlines()
    assert line.startswith(f"mergekit-lit: Ended by {sent}. Step ")
    assert line.endswith(
        f" of {STEPS} is kept in '{tmp_path}/checkpoints/dots'. "
        "The same command with --resume true goes on."
    )
    time.sleep(0.5)
    assert living(process.pid) == []
    if len(words) == 0:
        process = start(*command, "--resume=true")
        told = end_of(process)
        assert process.returncode == 0, told
        for file in ("dots.safetensors", "logs/dots/metrics.jsonl", "logs/dots/metrics.csv"):
            assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def sweep_file(suite, folder, **more):
    path = folder / "sweep.yaml"
    whole = {
        "out": str(folder / "out"),
        "data": {"suite": suite, "reserve": 4},
        "model": {"base": "vit@random:0", "image_size": 8, "schedule": "constant"},
        "trainer": {"log_every_n_steps": 1},
        "steps": [20, 60],
        "axes": {"data.task": ["dots", "stripes"]},
        "jobs": 2,
        **more,
    }
    path.write_text(yaml.safe_dump(whole))
    return path


def experts(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def under_way(out):
    return len(list(out.rglob("*-step20.safetensors"))) == 2


@pytest.fixture(scope="module")
def calm(tiny_suite, tmp_path_factory):
    """The experts of a sweep that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    process = start("sweep", sweep_file(tiny_suite, folder))
    told = end_of(process)
    assert process.returncode == 0, told
    return experts(folder / "out")


def test_a_sweep_gives_back_what_it_was_at_and_goes_on(tiny_suite, tmp_path, calm):
    path, out = sweep_file(tiny_suite, tmp_path), tmp_path / "out"
    process = start("sweep", path)
    wait_for(lambda: under_way(out), process)
    process.send_signal(signal.SIGTERM)
    told = end_of(process)
    assert process.returncode == 143, told
    assert told.splitlines()[-1] == "mergekit-lit: Ended by SIGTERM. The same sweep goes on."
    assert living(process.pid) == []
    assert not list(out.rglob("claim.*"))
    assert not list(out.rglob("failure.json"))
    assert list(out.rglob("last.ckpt"))
    again = start("sweep", path)
    told = end_of(again)
    assert again.returncode == 0, told
    assert experts(out) == calm


def test_submitit_queues_a_job_again_that_is_told_to_leave(tiny_suite, tmp_path, calm):
    options = {"cluster": "local", "timeout_min": 5}
    path = sweep_file(tiny_suite, tmp_path, launcher="slurm", launcher_options=options)
    out = tmp_path / "out"
    process = start("sweep", path)
    wait_for(lambda: under_way(out), process)
    holders = {json.loads(c.read_text())["pid"] for c in out.rglob("claim.1")}
    assert len(holders) == 2
    os.kill(holders.pop(), signal.SIGUSR2)
    told = end_of(process)
    assert process.returncode == 0, told
    assert experts(out) == calm
    printed = "".join(file.read_text() for file in (out / "slurm").rglob("*_log.out"))
    assert printed.count("Requeued job") == 1
    assert not list(out.rglob("failure.json"))
