"""Every way to start two processes gives one training, with the same expert to the last byte."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(sys.executable).parent
OURS = [sys.executable, "-m", "mergekit_lit"]
LIGHTNING = [
    sys.executable,
    "-c",
    "import sys; from mergekit_lit.cli.launch import lightning_main; sys.exit(lightning_main())",
]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def train_words(suite: str, out: Path) -> list[str]:
    return [
        "train",
        f"--data.suite={suite}",
        "--data.task=dots",
        "--data.batch=8",
        "--data.reserve=4",
        "--model.base=resnet@random:0",
        "--model.warmup_steps=0",
        "--steps=3",
        "--trainer.accelerator=cpu",
        f"--out={out}",
    ]


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("LT_", "PL_", "SLURM_", "RANK", "LOCAL_", "WORLD_", "MASTER_"))
    }
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )


def launchers(port: str) -> dict[str, list[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    fabric = [str(SCRIPTS / "fabric"), "run", "--accelerator=cpu", "--devices=2"]
    return {
        "mergekit-lit run": [*OURS, "run", "--devices", "2"],
        "lightning run": [*LIGHTNING, "run", "--devices=2"],
        "fabric run": [*fabric, f"--main-port={port}", str(SCRIPTS / "mergekit-lit")],
        "torchrun": [*torchrun, f"--master_port={port}", "-m", "mergekit_lit"],
    }


@pytest.fixture(scope="module")
def self_launched(tiny_suite, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("self")
    done = run([*OURS, *train_words(tiny_suite, out), "--trainer.devices=2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dots.safetensors") == 1
    return (out / "dots.safetensors").read_bytes()


@pytest.mark.parametrize("name", list(launchers("0")))
def test_every_launcher_gives_the_same_expert(name, self_launched, tiny_suite, tmp_path):
    done = run([*launchers(free_port())[name], *train_words(tiny_suite, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dots.safetensors") == 1
    assert (tmp_path / "dots.safetensors").read_bytes() == self_launched


def test_two_processes_are_not_one(self_launched, tiny_suite, tmp_path):
    """One process computes other BatchNorm statistics: proof that the two trained together."""
    done = run([*OURS, *train_words(tiny_suite, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dots.safetensors").read_bytes() != self_launched


def test_a_disagreement_is_an_error_and_writes_nothing(tiny_suite, tmp_path):
    words = [*OURS, "run", "--devices=2", *train_words(tiny_suite, tmp_path / "run")]
    done = run([*words, "--trainer.devices=1"])
    assert done.returncode == 2
    assert "`trainer.devices` must agree with the launcher, which says 2" in done.stderr
    # One line, whichever of the two processes has come to it first.
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_killed_process_ends_the_job_and_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(300)\n"
    )
    done = run([*OURS, "run", "--devices=2", str(script)])
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 (process " in done.stderr
    assert "was ended by SIGKILL. If nobody sent it, memory ran out" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plain_script_becomes_one_training(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from lightning.pytorch import Trainer\n"
        "from pathlib import Path\n"
        "trainer = Trainer(logger=False, enable_checkpointing=False)\n"
        "Path(sys.argv[1], f'{trainer.global_rank}-of-{trainer.world_size}').touch()\n"
    )
    words = [*OURS, "run", "--devices=2", "--accelerator=cpu", str(script), str(tmp_path)]
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*-of-*")) == ["0-of-2", "1-of-2"]
