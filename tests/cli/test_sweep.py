"""The command sweep: what it writes, skips and refuses."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.records import Record

BASE = "vit@random:0"
ENDS = ("record.json", "safetensors")

pytestmark = pytest.mark.usefixtures("told_in_one_line", "libraries")


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


def test_what_is_damaged_is_made_again(sweep_file, tmp_path, capsys, caplog):
    path = sweep_file({"data.task": ["dots"], "model.lr": [0.01, 0.02]}, steps=1)
    out = tmp_path / "out"
    assert run(path) == 0
    whole = experts(out)
    (record, *_), (expert, *_) = (sorted(out.rglob(f"dots*.{end}")) for end in ENDS)
    for file in (record, expert):
        file.write_bytes(file.read_bytes()[:9] if file == record else b"")
        capsys.readouterr()
        assert run(path, "--dry_run") == 0
        assert "1 runs are left to do" in capsys.readouterr().out
        assert run(path) == 0
        assert experts(out) == whole
    told = [each.getMessage() for each in caplog.records if "is damaged" in each.getMessage()]
    assert told == [f"{str(record)!r} is damaged: what it was the record of is made anew."]


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
        ({"data.task": ["dots"]}, ["--steps=0"], "`steps` must be at least 1, but is [0]"),
        ({"data.task": ["dots"]}, ["--steps=[]"], "`steps` must be at least 1, but is []"),
        ({"data.batch": [32, 0]}, ["--data.task=dots"], "`data.batch` must be at least 1"),
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


def test_names_that_look_like_numbers_are_names(sweep_file, tmp_path, monkeypatch, capsys):
    """Of ten thousand runs a few have names of digits alone; agents of W&B ask for them so."""
    monkeypatch.chdir(tmp_path)
    path = sweep_file({"data.task": ["dots"]})
    assert run(path, "--out=2024", "--run=4072932893982468") == 2
    told = capsys.readouterr().err
    assert "`run` must name one of the sweep's 1 runs, but is '4072932893982468'" in told


def test_a_file_is_needed(capsys):
    assert run("--jobs=1") == 2
    assert "A sweep must be given as a YAML file" in capsys.readouterr().err
    assert run("missing.yaml") == 2
    assert "No file 'missing.yaml'" in capsys.readouterr().err
    assert run("--help") == 0
    assert "--retries" in capsys.readouterr().out


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
