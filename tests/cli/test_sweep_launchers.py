"""The command sweep in several processes: here, by Ray and by SLURM, and what it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mergekit_lit.cli import main

pytestmark = pytest.mark.usefixtures("told_in_one_line", "libraries")


def run(*words) -> int:
    return main(["sweep", *map(str, words)])


def experts(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def start(*words) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mergekit_lit", "sweep", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, start_new_session=True, env=environment, text=True, stderr=subprocess.PIPE
    )


def wait_for(found, *processes) -> None:
    for _ in range(3000):
        if found() or any(process.poll() is not None for process in processes):
            return
        time.sleep(0.05)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_kills_lose_nothing_that_is_done(sweep_file, tmp_path):
    axes = {"data.task": ["dots", "stripes"], "model.seed": [0, 1], "steps": [20, 40]}
    path, out = sweep_file(axes, checkpoint_every=5), tmp_path / "out"
    assert run(path, f"--out={tmp_path / 'calm'}") == 0
    process = start(path, "--jobs=2")
    wait_for(lambda: list(out.rglob("last.ckpt")), process)
    # The launcher and its workers at once, as when a machine goes down.
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(out.rglob("claim.*"))
    begun = experts(out)
    again = start(path, "--jobs=2")
    wait_for(lambda: list(out.rglob("claim.2")), again)
    os.kill(workers_of(again)[0], signal.SIGKILL)
    assert again.wait(timeout=300) == 0
    again.communicate()
    whole = experts(out)
    assert {name: whole[name] for name in begun} == begun
    calm = {
        name.replace("/calm/", "/out/"): data for name, data in experts(tmp_path / "calm").items()
    }
    assert whole == calm
    assert not list(out.rglob("claim.*"))
    assert not list(out.rglob("failure.json"))


@pytest.mark.slow
def test_two_launches_on_one_folder_share_the_runs(sweep_file, tmp_path):
    axes = {"data.task": ["dots", "stripes"], "model.seed": [0, 1, 2], "steps": [20]}
    path, out = sweep_file(axes), tmp_path / "out"
    launches = [start(path, "--jobs=1") for _ in range(2)]
    assert [launch.wait(timeout=300) for launch in launches] == [0, 0]
    for launch in launches:
        launch.communicate()
    logs = [list(log.read_text().splitlines()) for log in out.rglob("metrics.csv")]
    assert len(logs) == 6
    assert len(experts(out)) == 6


@pytest.mark.slow
def test_slurm_through_submitit_on_this_machine(sweep_file, tmp_path):
    axes = {"data.task": ["dots", "stripes"], "model.seed": [0, 1], "steps": [2]}
    options = {"cluster": "local", "timeout_min": 5}
    path = sweep_file(axes, launcher="slurm", launcher_options=options)
    assert run(path, "--jobs=2") == 0
    assert len(experts(tmp_path / "out")) == 4
    assert list((tmp_path / "out" / "slurm").iterdir())


def test_ray_is_an_extra(sweep_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(sweep_file({"data.task": ["dots"]}), "--launcher=ray") == 2
    told = capsys.readouterr().err
    assert "needs the extra: pip install 'mergekit-lit[ray]'" in told
    assert not (tmp_path / "out").exists()


def test_a_token_that_ray_asks_for_is_told(sweep_file, tmp_path, capsys, monkeypatch):
    class AuthenticationError(Exception):
        def __str__(self):
            return "Token authentication is enabled but no token was found. Ensure that ..."

    def init(**_):
        raise AuthenticationError

    stand_in = ModuleType("ray")
    vars(stand_in).update(init=init, is_initialized=lambda: False)
    stand_in.exceptions = SimpleNamespace(RayError=AuthenticationError)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    assert run(sweep_file({"data.task": ["dots"]}), "--launcher=ray") == 2
    told = capsys.readouterr().err
    assert "no token was found. Put the cluster's token into RAY_AUTH_TOKEN" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_on_this_machine_and_a_worker_killed_in_mid_run(sweep_file, tmp_path):
    pytest.importorskip("ray")
    out, axes = tmp_path / "out", {"data.task": ["dots", "stripes"], "steps": [200]}
    options = {"num_cpus": 2, "object_store_memory": 10**8}
    path = sweep_file(axes, checkpoint_every=5, launcher="ray", launcher_options=options)
    process = start(path, "--jobs=2")
    wait_for(lambda: list(out.rglob("last.ckpt")), process)
    claims = list(out.rglob("claim.1"))
    os.kill(json.loads(claims[0].read_text())["pid"], signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    process.communicate()
    assert len(experts(out)) == 2
    assert not list(out.rglob("failure.json"))


@pytest.mark.slow
def test_ctrl_c_ends_soon_and_gives_claims_back(sweep_file, tmp_path):
    path = sweep_file({"data.task": ["dots", "stripes"], "steps": [10**6]})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(path, "--jobs=2")
    signal.signal(signal.SIGINT, before)
    out = tmp_path / "out"
    wait_for(lambda: len(list(out.rglob("metrics.*"))) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "interrupted" in process.communicate()[1]
    assert not list(out.rglob("claim.*"))
