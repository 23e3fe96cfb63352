"""docker/ is true: what it names exists, versions fit, commands parse, nothing runs as root."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mergekit_lit.cli import COMMANDS, sweep

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TARGETS = ("cpu", "cuda")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage of the Dockerfile, `FROM` first."""
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            name = rest.split()[2]
            found[name] = []
        if found:
            found[name].append((word, rest))
    return found


def chain(target: str) -> list[tuple[str, str]]:
    """Return the instructions of a stage, after those of the stages that it is made from."""
    made = stages()[target]
    base = made[0][1].split()[0]
    return [*(chain(base) if base in stages() else []), *made]


def last(target: str, word: str) -> str:
    return [rest for instruction, rest in chain(target) if instruction == word][-1]


def pins() -> dict[str, Version]:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    found = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs)
    return found


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_each_requirement_is_pinned_to_a_version_that_it_allows(extra):
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), text


def test_the_images_python_is_one_that_the_project_takes():
    (python,) = re.findall(r"^ARG PYTHON=(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


def test_requirements_of_the_image_are_those_of_the_project_and_its_extras():
    ((_, command),) = [each for each in stages()["requirements"] if each[0] == "RUN"]
    words = shlex.split(command.partition(">")[0])
    assert set(words[3:]) == set(EXTRAS) - {"dev"}
    words[:2] = [sys.executable, str(DOCKER / words[1])]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = {*PROJECT["dependencies"], *(each for extra in words[3:] for each in EXTRAS[extra])}
    assert sorted(told.splitlines()) == sorted(expected)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_the_command_line_as_a_user_without_rights(target):
    (user,) = re.findall(r"^ARG UID=(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert int(user) > 0
    assert last(target, "USER") == "${UID}"
    # An argument that the stage does not name is empty there, and an empty user is root.
    assert ("ARG", "UID") in stages()[target]
    (program,) = yaml.safe_load(last(target, "ENTRYPOINT"))
    assert program in PROJECT["scripts"]
    assert [word for word, _ in chain(target)][-1] == "USER"


@pytest.mark.parametrize("target", TARGETS)
def test_code_comes_after_the_layer_of_its_requirements(target):
    words = [f"{word} {rest}" for word, rest in chain(target)]
    copied = [rest.split() for word, rest in chain(target) if word == "COPY"]
    assert [each[-2].rpartition("/")[2] for each in copied] == [
        "requirements.txt",
        "constraints.txt",
    ]
    (code,) = [at for at, each in enumerate(words) if "/wheels/" in each]
    (required,) = [at for at, each in enumerate(words) if "--requirement" in each]
    assert required < code


def test_the_context_holds_what_is_copied_and_packaged():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copies = [rest.split() for made in stages().values() for word, rest in made if word == "COPY"]
    ours = [name for words in copies if "--from" not in words[0] for name in words[:-1]]
    packaging = ["callbacks", "mergekit_lit", PROJECT["readme"], *PROJECT["license-files"]]
    for name in {*ours, *packaging} - {"."}:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in kept), name


def compose() -> dict:
    """Return the compose file with the defaults of its variables."""
    text = (DOCKER / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$"))


def test_services_are_made_from_the_dockerfile_and_wait_for_each_other():
    services = compose()["services"]
    assert set(services) == {"head", "worker", "sweep"}
    for service in services.values():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in TARGETS
        assert set(build["args"]) <= {rest.split("=")[0] for word, rest in chain("cpu")}
        assert set(service.get("depends_on", {})) <= set(services)
        places = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
        assert set(yaml.safe_load(last("cpu", "VOLUME"))) <= set(places)
        named = {place for place in places.values() if not place.startswith(".")}
        assert named == set(compose()["volumes"])


def test_the_sweep_of_the_compose_file_is_one(monkeypatch):
    asked = {}

    def run_sweep(*_, **settings):
        asked.update(settings)
        done = {"runs": 0, "done": 0, "failed": {}}
        record, outcome = SimpleNamespace(metrics=done), SimpleNamespace(failed=[])
        return SimpleNamespace(record=record, table="results.csv", outcome=outcome)

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    monkeypatch.chdir(ROOT)
    name, *arguments = compose()["services"]["sweep"]["command"]
    assert (name, sweep.run(arguments)) == ("sweep", 0)
    assert (asked["launcher"], asked["options"], asked["jobs"]) == ("ray", {"address": "auto"}, 2)
    assert asked["out"].parts[0] == "runs"


@pytest.fixture
def stand_ins(tmp_path):
    """Return a function that puts programs on the PATH which write down their arguments."""

    def make(**bodies):
        for name, body in bodies.items():
            program = tmp_path / name.replace("_", "-")
            said = f'echo "{program.name} $*" >> "{tmp_path}/said"'
            program.write_text(f"#!/usr/bin/env bash\n{said}\n{body}\n")
            program.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    return make


def test_the_sweep_joins_the_cluster_first(stand_ins, tmp_path):
    service = compose()["services"]["sweep"]
    command = [*service["entrypoint"], "sweep", "a b.yaml"]
    subprocess.run(command, env=stand_ins(ray="", mergekit_lit='[ "$2" = "a b.yaml" ]'), check=True)
    joined, swept = (tmp_path / "said").read_text().splitlines()
    assert joined == "ray start --address=head:6379 --num-cpus=0"
    assert swept == "mergekit-lit sweep a b.yaml"


@pytest.mark.parametrize("code", [0, 3])
def test_a_batch_job_ends_as_its_command_does(code, stand_ins, tmp_path):
    environment = stand_ins(srun=f"exit {code}", scontrol="")
    job = ["bash", str(DOCKER / "slurm.sbatch"), "sweep", "s.yaml"]
    assert subprocess.run(job, env=environment, check=False).returncode == code
    assert (tmp_path / "said").read_text() == (
        "srun --kill-on-bad-exit=1 mergekit-lit sweep s.yaml\n"
    )


def test_a_batch_job_runs_in_an_image_if_it_is_given_one(stand_ins, tmp_path):
    environment = {**stand_ins(srun=""), "IMAGE": "lit.sif"}
    subprocess.run(["bash", DOCKER / "slurm.sbatch", "tasks"], env=environment, check=True)
    assert "apptainer exec --nv lit.sif mergekit-lit tasks" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("code", [0, 75])
def test_a_batch_job_is_queued_again_where_its_time_ends_before_its_work(code, stand_ins, tmp_path):
    # What the processes of srun do: they come to the end of a step, and leave with that code.
    told = f'told() {{ sleep 0.2; echo kept >> "{tmp_path}/said"; exit {code}; }}; trap told USR1'
    environment = stand_ins(srun=f"{told}; sleep 20 & echo > ready; wait", scontrol="")
    script = ["bash", str(DOCKER / "slurm.sbatch"), "tasks"]
    job = subprocess.Popen(script, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == code
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text().splitlines()[1:]
    assert said == ["kept", *["scontrol requeue 7"][: code > 0]]


def test_a_batch_job_needs_a_command():
    job = ["bash", str(DOCKER / "slurm.sbatch")]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_options_of_sbatch_stand_where_it_reads_them():
    lines = (DOCKER / "slurm.sbatch").read_text().splitlines()
    options = [at for at, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert max(options) < first
    given = {lines[at].split()[1].partition("=")[0] for at in options}
    assert {"--requeue", "--signal", "--job-name"} <= given


def test_every_command_that_is_named_exists():
    texts = [path.read_text() for path in DOCKER.iterdir() if path.is_file()]
    named = re.findall(r"`mergekit-lit ([a-z]+)|mergekit-lit:cpu ([a-z]+)", "\n".join(texts))
    named += re.findall(r"slurm\.sbatch (?:\\\n# +)?([a-z]+) ", "\n".join(texts))
    words = {word for each in named for word in ([each] if isinstance(each, str) else each)} - {""}
    assert {"doctor", "quickstart", "sweep", "train"} <= words
    assert words <= set(COMMANDS)
