"""The command sweep: what it writes, skips, refuses, and survives."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

from mergekit_lit.cli import main
from mergekit_lit.cli.dotted import nested
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.cli.train_job import TrainJob
from mergekit_lit.core.experts import load_expert
from mergekit_lit.core.records import Record
from mergekit_lit.models.backbones import load_base
from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.plan import plan_runs

BASE = "vit@random:0"


@pytest.fixture(autouse=True)
def told_in_one_line(monkeypatch):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Loads timm before the clock of the first test runs."""
    load_base(BASE, image_size=8)


@pytest.fixture
def sweep_file(tiny_suite, tmp_path):
    """Writes a sweep over the tiny suite and returns its file."""

    def write(axes, *, job="train", name="sweep.yaml", **more) -> str:
        whole = {
            "job": job,
            "out": str(tmp_path / "out"),
            "jobs": 1,
            "data": {"suite": tiny_suite, "reserve": 4},
            "axes": axes,
        }
        if job == "train":
            whole |= {"steps": 2}
            whole |= {"model": {"base": BASE, "image_size": 8, "schedule": "constant"}}
        whole |= more
        path = tmp_path / name
        path.write_text(yaml.safe_dump(whole))
        return str(path)

    return write


def run(*words) -> int:
    return main(["sweep", *map(str, words)])


def experts(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def test_one_trajectory_gives_what_separate_trainings_give(sweep_file, tmp_path, tiny_suite):
    axes = {"data.task": ["dots", "stripes"], "steps": [2, 3]}
    assert run(sweep_file(axes)) == 0
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert rows[0].split(",")[:3] == ["run", "task", "steps"]
    assert len(rows) == 5
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2
    words = [f"--data.suite={tiny_suite}", "--data.reserve=4", "--data.task=dots"]
    words += [f"--model.base={BASE}", "--model.image_size=8", "--model.schedule=constant"]
    alone = tmp_path / "alone"
    assert main(["train", *words, "--model.warmup_steps=1", "--steps=2", f"--out={alone}"]) == 0
    (shared,) = (tmp_path / "out").rglob("dots-step2.safetensors")
    assert shared.read_bytes() == (alone / "dots.safetensors").read_bytes()


def test_what_is_done_is_not_done_again_and_more_can_be_asked(sweep_file, tmp_path, capsys):
    out = tmp_path / "out"
    axes = {"data.task": ["dots"], "model.lr": [0.01], "steps": [2]}
    assert run(sweep_file(axes)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("dots-step2.safetensors")}
    assert run(sweep_file({**axes, "model.lr": [0.01, 0.02], "steps": [2, 3]})) == 0
    assert len(before) == 1
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    names = sorted(path.name for path in out.rglob("*.safetensors"))
    assert names == sorted(2 * [f"dots-step{steps}.safetensors" for steps in (2, 3)])
    capsys.readouterr()
    assert run(sweep_file(axes), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stage"] == "sweep"
    assert record["metrics"] == {"runs": 1, "results": 1, "done": 1, "failed": {}}


def test_the_path_and_not_its_length_names_a_training(tiny_suite):
    data = {"suite": tiny_suite, "task": "dots"}
    job = TrainJob({"data": data, "model": {"schedule": "constant"}, "steps": 100})

    def name(**point):
        config = job.complete({key.replace("_", ".", 1): value for key, value in point.items()})
        return repr(sorted(job.identity(config)[0].items()))

    assert name(steps=100) == name(steps=400)
    # A warm-up of at most half the steps is another path.
    assert name(steps=30) != name(steps=100)
    assert name(model_schedule="cosine", steps=100) != name(model_schedule="cosine", steps=400)
    assert name(model_seed=1) != name()


def test_seed_is_short_for_that_of_the_model(tiny_suite):
    job = TrainJob({"data": {"suite": tiny_suite, "task": "all"}, "steps": 2})
    one, other = (plan_runs(read_axes({key: [3, 4]}), job) for key in ("seed", "model.seed"))
    assert len(one.runs) == 4
    assert [run.name for run in one.runs] == [run.name for run in other.runs]


def test_interpolations_follow_the_axes(tiny_suite):
    data = {"suite": tiny_suite, "task": "dots", "split_seed": 7}
    job = TrainJob({"data": data, "model": {"seed": "${data.split_seed}"}, "steps": 2})
    plan = plan_runs(read_axes({"data.split_seed": [1, 2], "model.lr": [0.1, 0.2, 0.3]}), job)
    found = [plan.config(run) for run in plan.runs]
    assert [config["model.seed"] for config in found] == [1, 1, 1, 2, 2, 2]
    assert len(plan.bases) == 2


def test_ten_thousand_runs_are_planned_in_little_time_and_memory(tiny_suite):
    job = TrainJob({"data": {"suite": tiny_suite, "task": "all"}, "steps": 100})
    draws = {"random": {"low": 1e-4, "high": 0.1, "log": True, "samples": 50}}
    axes = {"model.lr": draws, "model.seed": list(range(100))}
    begun = time.process_time()
    plan = plan_runs(read_axes(axes), job)
    assert len({run.name for run in plan.runs}) == 10_000
    assert time.process_time() - begun < 5
    assert len(pickle.dumps(plan)) < 2 * 10**6


def test_the_example_is_the_grid_that_is_timed():
    path = Path(__file__).parents[2] / "experiments" / "sweep_resnet_embedded8.yaml"
    values = yaml.safe_load(path.read_text())
    axes = read_axes(values.pop("axes"))
    ours = ("job", "out", "retries", "launcher")
    plan = plan_runs(axes, TrainJob({key: values[key] for key in values if key not in ours}))
    assert (len(plan.runs), plan.results, plan.shared) == (54, 216, 54)


def test_a_dry_run_tells_and_writes_nothing(sweep_file, tmp_path, capsys):
    path = sweep_file({"data.task": ["dots", "stripes"], "steps": [2, 3, 40]})
    assert run(path, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "4 runs make 6 results; 2 of them are trajectories" in told
    assert "core-hours" in told
    assert not (tmp_path / "out").exists()


def test_flags_win_over_the_file(sweep_file, tmp_path):
    path = sweep_file({"data.task": ["dots"]})
    assert run(path, f"--out={tmp_path / 'other'}", "--steps=1", "--model.seed=5") == 0
    (config,) = (tmp_path / "other" / "runs").rglob("config.yaml")
    written = yaml.safe_load(config.read_text())
    assert written["steps"] == [1]
    assert written["model"]["seed"] == 5


def test_optuna_chooses_for_all_tasks_together(sweep_file, tmp_path, capsys):
    axes = {"data.task": ["dots", "stripes"], "model.lr": {"optuna": {"low": 0.01, "high": 0.1}}}
    study = {"metric": "val_loss", "trials": 2, "batch": 1}
    assert run(sweep_file(axes, optuna=study)) == 0
    told = capsys.readouterr().out
    assert "Best val_loss: " in told
    assert "4 of 4 runs are done." in told
    record = json.loads((tmp_path / "out" / "sweep.record.json").read_text())
    assert len(record["metrics"]["trials"]) == 2


def test_failures_are_listed_and_the_rest_is_done(sweep_file, capsys):
    path = sweep_file({"data.task": ["dots"], "data.n": [10**6, 30]})
    assert run(path) == 1
    told = capsys.readouterr()
    assert "`n` must" in told.out
    assert "1 of 2 runs are done." in told.out
    (line,) = [line for line in told.err.splitlines() if "failed: `n` must" in line]
    assert line.startswith("Run ")


@pytest.mark.parametrize(
    ("axes", "flags", "message"),
    [
        ({"model.lrr": [1]}, [], "No parameter named 'model.lrr'. Did you mean 'model.lr'?"),
        ({"model.lr": []}, [], "The axis `model.lr` must have a value to try"),
        ({"model.lr": ["fast"]}, [], "`model.lr` must be"),
        (
            {"data.task": ["dots"], "model.lr": [0.1, -1.0]},
            [],
            "`lr` must be positive and finite, but is -1.0",
        ),
        ({"model.schedule": ["cosin"]}, [], "Did you mean 'cosine'?"),
        ({"data.task": ["dots"], "out": ["a", "b"]}, [], "The axis `out` must decide what comes"),
        ({"data.task": ["dot"]}, [], "Did you mean 'dots'?"),
        ({"data.task": ["dots"]}, ["--job=trian"], "No job named 'trian'. Did you mean 'train'?"),
        ({"data.task": ["dots"]}, ["--jobs=0"], "`jobs` must be at least 1, but is 0"),
        ({"data.task": ["dots"]}, ["--retries=-1"], "`retries` must be at least 0"),
        ({"data.task": ["dots"]}, ["--launcher=lokal"], "Did you mean 'local'?"),
        ({"data.task": ["dots"]}, ["--launcher=slurm"], "submitit cannot start jobs on 'slurm'"),
        ({"data.task": ["dots"]}, ["--launcher_options.mem_gb=1"], "`launcher_options` must be"),
        ({"model.lr": [{"optuna": 1}]}, [], "`model.lr` must be"),
        ({"model.lr": {"optuna": {"low": 0.1, "high": 1}}}, [], "`optuna` must say"),
        ({"data.task": ["dots"]}, ["--optuna.metrics=x"], "Did you mean 'metric'?"),
        ({"data.task": ["dots"]}, ["--optuna.trials=3"], "`optuna.metric` must be given"),
        ({"data.task": ["dots"]}, ["--model.seeds=1"], "Did you mean 'model.seed'?"),
        ({"data.task": ["dots"]}, ["--steps=a"], "`steps` must be"),
        ({"model.seed": [0, 1]}, ["--seed=3"], "`seed` must be left out beside the axis"),
        ({"model.seed": [0, 1], "seed": [3]}, [], "`seed` must be left out beside the axis"),
        ({"data.task": ["dots"]}, ["more"], "must be given as a YAML file, but 'more' is none"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    sweep_file, tmp_path, capsys, axes, flags, message
):
    assert run(sweep_file(axes), *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_is_needed(capsys):
    assert run("--jobs=1") == 2
    assert "A sweep must be given as a YAML file" in capsys.readouterr().err
    assert run("missing.yaml") == 2
    assert "No file 'missing.yaml'" in capsys.readouterr().err
    assert run("--help") == 0
    assert "--retries" in capsys.readouterr().out


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


def test_runs_in_lockstep_keep_their_names_and_results(sweep_file, tmp_path, capsys):
    axes = {"data.task": ["dots"], "model.lr": [0.001, 0.002], "steps": [2]}
    assert run(sweep_file({**axes, "model.lr": [0.001]}), "--lockstep=always") == 0
    assert run(sweep_file({**axes, "model.lr": [0.001, 0.002, 0.003]}), "--lockstep=always") == 0
    assert "In lockstep on cpu, as asked." in capsys.readouterr().out
    kept = tmp_path / "out"
    one_by_one = sweep_file({**axes, "model.lr": [0.001, 0.002, 0.003]}, out=str(tmp_path / "each"))
    assert run(one_by_one, "--lockstep=never") == 0
    found, alone = (experts(folder) for folder in (kept, tmp_path / "each"))
    assert [Path(path).parts[-2:] for path in found] == [Path(p).parts[-2:] for p in alone]
    assert len(found) == 3
    assert sum(found[p] == other for p, other in zip(found, alone.values(), strict=True)) < 3
    for path, other in zip(found, alone, strict=True):
        one, two = load_expert(Path(path)), load_expert(Path(other))
        for name, tensor in one.backbone.items():
            torch.testing.assert_close(tensor, two.backbone[name], rtol=1e-4, atol=1e-5)
    records = [Record.read(path) for path in kept.glob("runs/*/*.record.json")]
    assert sorted(r.metrics.get("lockstep", {}).get("runs", 1) for r in records) == [1, 2, 2]
    told = Record.read(kept / "sweep.record.json").metrics["lockstep"]
    assert [(each["device"], each["together"]) for each in told] == [("cpu", True)]


def test_what_cannot_go_in_lockstep_is_said_once(sweep_file, tmp_path, capsys):
    axes = {"data.task": ["dots"], "model.lr": [0.001, 0.002]}
    path = sweep_file(axes, steps=1)
    flags = ["--model.warmup_steps=0", "--model.sam_radius=0.01", "--lockstep=always"]
    assert run(path, *flags) == 0
    told = capsys.readouterr().err
    assert told.count("Not in lockstep, but one by one: `model.sam_radius` is 0.01.") == 1
    assert len(experts(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("more", "tried"),
    [
        ({"data.batch": 8}, True),
        ({"data.batch": 32}, False),
        ({"data.batch": 8, "model.finetuning": "lora"}, False),
        ({"data.batch": 8, "trainer.precision": "bf16-mixed"}, False),
        ({"data.batch": 8, "trainer.gradient_clip_val": 1.0}, True),
        ({"data.batch": 8, "logger": "wandb"}, False),
    ],
)
def test_lockstep_is_tried_where_it_may_pay(more, tried, tiny_suite, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"data": {"suite": tiny_suite, "task": "dots"}, "steps": 2}
    job = TrainJob(merged_values(given, nested(more)))
    points = ({"model.lr": 0.1, "data.n": 9}, {"model.lr": 0.2, "model.seed": 3})
    one, other = (job.alike(job.complete(point)) for point in points)
    assert bool(one.execute and one.may_pay) == tried
    assert one.kind == other.kind
    assert one.kind != job.alike(job.complete({"model.label_smoothing": 0.1})).kind or not tried


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
