"""The README is true: its commands run, its table of methods is the registry's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_lit.core.files import file_hash
from mergekit_lit.merging import methods_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_the_gate_runs_the_test_command():
    (command,) = [block for block in blocks("bash") if "tests/check.sh" in block]
    assert command.strip() in (ROOT / ".ci" / "run").read_text()


def test_the_table_of_methods_is_the_registry():
    rows = re.findall(
        r"^\| `(\w+)` \| ([\w-]+) \| ([\w-]+) \| (.*) \| (.*) \|$", README, re.MULTILINE
    )
    expected = [
        (row["name"], row["family"], row["data"], row["summary"], row["source"])
        for row in methods_table()
        if not row["name"].startswith("test_")
    ]
    assert rows == expected


def test_every_command_of_the_readme_exists():
    known = {"quickstart", "train", "merge", "evaluate", "report", "card", "tasks", "methods"}
    known |= {"doctor", "run", "tune", "predict", "recommend", "COMMAND"}
    used = set(re.findall(r"mergekit-lit ([a-zA-Z]+)", README))
    assert used <= known


@pytest.mark.slow
def test_the_steps_run_in_order(tmp_path):
    (steps,) = [block for block in blocks("bash") if "mergekit-lit evaluate" in block]
    for line in steps.replace("\\\n", " ").splitlines():
        # A few steps show that it runs; the README's 200 are for the reader.
        words = shlex.split(line.replace("--steps 200", "--steps 25"))
        expanded = [
            str(path) for w in words for path in (sorted(tmp_path.glob(w)) if "*" in w else [w])
        ]
        run([sys.executable, "-m", "mergekit_lit", *expanded[1:]], tmp_path)
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def launch_lines() -> list[str]:
    """The README's lines that start several processes, to the letter."""
    (lines,) = [block for block in blocks("bash") if "torchrun" in block]
    return lines.splitlines()


def launched(line: str, folder: Path) -> str:
    """Run one of those lines in a folder and return the hash of the expert that it made."""
    # A few steps show that it runs; the README's 50 are for the reader.
    short = line.replace("--steps 50", "--steps 21")
    assert short != line
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        short, shell=True, cwd=folder, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return file_hash(folder / "runs" / "two" / "mnist.safetensors")


@pytest.fixture(scope="module")
def first_expert(tmp_path_factory) -> str:
    return launched(launch_lines()[0], tmp_path_factory.mktemp("first"))


@pytest.mark.slow
@pytest.mark.parametrize("line", launch_lines()[1:])
def test_every_launch_line_gives_the_same_expert(line, first_expert, tmp_path):
    assert launched(line, tmp_path) == first_expert


def test_there_are_five_launch_lines():
    assert len(launch_lines()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tmp_path):
    run([sys.executable, "-c", blocks("python")[number]], tmp_path)
