"""The commands, in this process, on the tiny suite: what they write, print and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lit.cli import main
from mergekit_lit.cli.card import describe
from mergekit_lit.core.expert_files import load_expert, load_merged
from mergekit_lit.core.tensorfiles import write_tensors

BASE = "--model.base=resnet@random:0"


@pytest.fixture(autouse=True)
def told_in_one_line(monkeypatch):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def experts(tiny_suite, tmp_path_factory) -> Path:
    """A run folder with one expert for each of the two tasks, made by one command."""
    folder = tmp_path_factory.mktemp("experts")
    config = folder.parent / "train.yaml"
    text = {
        "data": {"suite": tiny_suite, "task": "all", "batch": 8, "reserve": 4},
        "model": {"base": "resnet@random:0", "warmup_steps": 0},
        "steps": [2],
        "out": f"{folder}/${{model.optimizer}}",
    }
    config.write_text(yaml.safe_dump(text))
    assert main(["train", "--config", str(config), "--model.lr=0.01"]) == 0
    return folder / "sgd"


def files_of(experts: Path) -> list[str]:
    return [str(experts / f"{task}.safetensors") for task in ("dots", "stripes")]


class Halve:
    """Halves every delta."""

    def __init__(self, by: float = 0.5) -> None:
        self.by = by

    def on_merge_start(self, experts, method, config):
        pass

    def on_merge_tensor(self, name, deltas):
        return self.by * deltas

    def on_merge_end(self, experts, merged):
        pass


def test_train_writes_experts_and_a_config(experts):
    assert {path.name for path in experts.iterdir()} >= {
        "config.yaml",
        "config.resolved.yaml",
        "dots.safetensors",
        "dots.record.json",
        "stripes.safetensors",
        "stripes.record.json",
    }
    card = load_expert(experts / "dots.safetensors").card
    assert (card.steps, card.lr, card.optimizer) == (2, 0.01, "sgd")
    written = yaml.safe_load((experts / "config.yaml").read_text())
    assert written["out"].endswith("/${model.optimizer}")
    assert written["model"]["lr"] == 0.01


def test_the_saved_config_gives_the_same_bytes(experts, tmp_path):
    config = str(experts / "config.yaml")
    words = ["train", "--config", config, "--data.task=dots", f"--out={tmp_path}"]
    assert main(words) == 0
    again = (tmp_path / "dots.safetensors").read_bytes()
    assert again == (experts / "dots.safetensors").read_bytes()


def test_a_short_seed_is_the_model_s(experts, tmp_path, capsys):
    config = str(experts / "config.yaml")
    words = ["train", "--config", config, "--data.task=dots", f"--out={tmp_path}"]
    assert main([*words, "--seed=3", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["seed"] == 3
    assert card["file"].endswith("dots.safetensors")


def test_a_callback_is_added_by_class_path(experts, tmp_path):
    config = str(experts / "config.yaml")
    words = ["train", "--config", config, "--data.task=dots", f"--out={tmp_path}"]
    path = "lightning.pytorch.callbacks.LearningRateMonitor"
    callback = f"--trainer.callbacks+={{class_path: {path}, init_args: {{logging_interval: step}}}}"
    assert main([*words, callback]) == 0
    rows = (tmp_path / "logs" / "dots" / "metrics.jsonl").read_text().splitlines()
    assert any("lr-SGD" in json.loads(row) for row in rows)


def test_merge_scores_and_report(experts, tiny_suite, tmp_path, capsys):
    merged = tmp_path / "sum.safetensors"
    words = ["merge", *files_of(experts), "--method=task_arithmetic", "--scale=0.25"]
    assert main([*words, f"--out={merged}", "--batch_norm=average"]) == 0
    facts = load_merged(merged).facts
    assert facts["config"] == {"scale": 0.25}
    assert facts["coefficients"] == [0.25, 0.25]
    models = ["resnet@random:0", *files_of(experts), str(merged)]
    capsys.readouterr()
    words = ["evaluate", *models, f"--data.suite={tiny_suite}", f"--out={tmp_path}"]
    assert main([*words, "--data.reserve=4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["metrics"]["models"]) >= {"sum", "experts"}
    assert (tmp_path / "evaluation.config.yaml").is_file()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_merge_runs_again_from_its_config(experts, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    config = tmp_path / "merge.yaml"
    config.write_text("method: weighted_average\nweights: [3, 1]\n")
    assert main(["merge", *files_of(experts), f"--config={config}", f"--out={first}"]) == 0
    saved = str(tmp_path / "first.config.yaml")
    assert main(["merge", "--config", saved, f"--out={second}"]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_an_observer_changes_the_deltas(experts, tmp_path):
    plain, halved = tmp_path / "plain.safetensors", tmp_path / "halved.safetensors"
    words = ["merge", *files_of(experts), "--method=task_arithmetic"]
    path = f"--callbacks+={{class_path: {__name__}.Halve, init_args: {{by: 0.5}}}}"
    assert main([*words, "--scale=0.5", f"--out={plain}"]) == 0
    assert main([*words, "--scale=1.0", f"--out={halved}", path]) == 0
    left, right = load_merged(plain).shared, load_merged(halved).shared
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_help_of_merge_shows_the_method_s_own_flags(capsys):
    assert main(["merge", "--method=task_arithmetic", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--scale SCALE" in told
    assert "--weights" not in told
    assert main(["merge", "--method", "weighted_average", "--help"]) == 0
    assert "--weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "report", "card", "tasks", "methods", "doctor", "quickstart"]
)
def test_every_parameter_is_explained(command, capsys):
    assert main([command, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    # A parameter without words shows its type right after its name.
    ours = told.partition("--trainer CONFIG")[0]
    assert " (type: " in ours
    names = [part.split()[0] for part in ours.split(" --") if part.split()]
    unexplained = [name for name in names if f"--{name} {name.upper()} (type" in ours]
    assert unexplained == []


def test_card_and_methods_and_tasks_speak_json(experts, tiny_suite, capsys):
    assert main(["card", files_of(experts)[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["card"]["task"]) == ("expert", "dots")
    assert main(["card", files_of(experts)[0]]) == 0
    assert "card.task" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    assert {"average", "task_arithmetic"} <= {
        row["name"] for row in json.loads(capsys.readouterr().out)
    }
    assert main(["tasks", tiny_suite, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["dots", "stripes"]
    assert main(["doctor", tiny_suite, "--json"]) in (0, 1)
    assert {"versions", "devices", "disk", "wandb", "commands"} <= {
        row["area"] for row in json.loads(capsys.readouterr().out)["checks"]
    }


BAD_TRAINING = {
    "unknown task": (["--data.task=dotz"], "Did you mean 'dots'?"),
    "one task twice": (["--data.task=dots,dots"], "Each task must be named once"),
    "unknown suite": (["--data.suite=embeded8"], "Did you mean 'embedded8'?"),
    "unknown backbone": (["--model.base=resnett@random:0"], "resnett"),
    "unknown key": (["--model.lrr=1"], "Did you mean 'model.lr'?"),
    "unknown optimizer": (["--model.optimizer=sdg"], "Did you mean 'sgd'?"),
    "unknown callback": (["--trainer.callbacks+=nowhere.Callback"], "nowhere"),
    "K below 1": (["--steps=0"], "`steps`"),
    "K no number": (["--steps=many"], "`steps`"),
    "batch below 1": (["--data.batch=0"], "batch"),
    "n above the images": (["--data.n=100000"], "n"),
    "n below 1": (["--data.n=0"], "n"),
    "lr not finite": (["--model.lr=.inf"], "`lr`"),
    "lr negative": (["--model.lr=-1"], "`lr`"),
    "lr nan": (["--model.lr=nan"], "`model.lr` must be a finite number, but is 'nan'"),
    "val share nan": (["--data.val_share=nan"], "must be a finite number, but is 'nan'"),
    "val share nan in YAML": (["--data.val_share=.nan"], "must lie in [0, 1), but is nan"),
    "val share infinite": (["--data.val_share=inf"], "must be a finite number, but is 'inf'"),
    "a file as root": (
        ["--data.suite=vision8", "--data.task=mnist", "--data.root=/dev/null", "--data.download"],
        "The `root` of the data sets must be a folder, but '/dev/null' is a file",
    ),
    "no jobs": (["--jobs=0"], "`jobs`"),
    "jobs of several processes": (
        ["--jobs=2", "--trainer.devices=2", "--trainer.accelerator=cpu"],
        "`jobs` must be 1",
    ),
    "several K under cosine": (["--steps=1,2"], "cosine"),
    "max_steps": (["--trainer.max_steps=2"], "Did you mean 'steps'?"),
    "bad precision": (["--trainer.precision=17"], "precision"),
    "bad accelerator": (["--trainer.accelerator=abacus"], "abacus"),
    "no key for W&B": (["--logger=wandb-online"], "API key"),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_is_one_line_and_leaves_nothing(
    name, tiny_suite, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    words, message = BAD_TRAINING[name]
    out = tmp_path / "run"
    given = [f"--data.suite={tiny_suite}", "--data.task=dots", "--data.reserve=4", BASE]
    given += ["--steps=1", "--model.warmup_steps=0", f"--out={out}"]
    assert main(["train", *given, *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()


def test_a_damaged_neighbour_and_commas_in_names_do_not_hinder(tiny_suite, tmp_path, capsys):
    folder, out = tmp_path / "own", tmp_path / "run"
    folder.mkdir()
    for name in ("a,b", "b"):
        shutil.copy(Path(tiny_suite) / "dots.npz", folder / f"{name}.npz")
    (folder / "bad.npz").write_bytes(b"PK")
    words = ["train", f"--data.suite={folder}", "--data.reserve=4", "--model.warmup_steps=0"]
    words += ["--model.base=vit@random:0", "--model.image_size=8", "--steps=1"]
    for task in ("bad", "all"):
        assert main([*words, f"--data.task={task}", f"--out={out}"]) == 2
        told = capsys.readouterr().err
        assert "bad.npz' must be a whole npz file" in told
        assert told.count("\n") == 1
        assert not out.exists()
    assert main([*words, "--data.task=a,b, b", f"--out={out}"]) == 0
    assert {path.stem for path in out.glob("*.safetensors")} == {"a,b", "b"}
    assert main(["tasks", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "bad is damaged: " in told
    assert told.count("Make it again") == 1


def test_jobs_under_a_launcher_are_refused(tiny_suite, tmp_path, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    words = [f"--data.suite={tiny_suite}", "--data.task=all", BASE, "--steps=1", "--jobs=2"]
    assert main(["train", *words, f"--out={tmp_path / 'run'}"]) == 2
    assert "`jobs` must be 1 where a launcher" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


BAD_MERGES = {
    "unknown method": (["--method=task_arithmetics"], "Did you mean 'task_arithmetic'?"),
    "unknown flag": (["--method=task_arithmetic", "--scal=1"], "Did you mean 'scale'?"),
    "flag of another method": (["--method=average", "--scale=1"], "No parameter named 'scale'"),
    "scale nan": (["--method=task_arithmetic", "--scale=nan"], "`scale`"),
    "scale infinite": (["--method=task_arithmetic", "--scale=.inf"], "`scale`"),
    "weights of another number": (["--method=weighted_average", "--weights=1"], "`weights`"),
    "unknown policy": (["--batch_norm=avarage"], "Did you mean 'average'?"),
    "images of no suite": (["--data.images=1"], "`data.images` must come with `data.suite`"),
    "split of no suite": (["--data.n=9", "--batch_norm=average"], "`data.n` must come with"),
    "no suite for images": (["--batch_norm=recalibrate"], "suite"),
    "missing expert": (["nowhere.safetensors"], "No file 'nowhere.safetensors'"),
    "another base": (["--base=resnet@random:1"], "base"),
    "bad observer": (["--callbacks+=nowhere.Observer"], "nowhere"),
    "no observer": (["--callbacks+=pathlib.Path"], "on_merge_tensor"),
}


@pytest.mark.parametrize("name", BAD_MERGES)
def test_a_bad_merge_is_one_line_and_leaves_nothing(name, experts, tmp_path, capsys):
    words, message = BAD_MERGES[name]
    out = tmp_path / "merged.safetensors"
    assert main(["merge", *files_of(experts), f"--out={out}", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


BAD_EVALUATIONS = {
    "missing file": (["nowhere.safetensors"], "nowhere.safetensors"),
    "unknown split": (["--data.split=tset"], "Did you mean 'test'?"),
    "unknown task": (["--data.tasks=dotz"], "Did you mean 'dots'?"),
    "batch below 1": (["--data.batch=0"], "`batch`"),
    "unknown policy": (["--batch_norm=storred"], "Did you mean 'stored'?"),
}


@pytest.mark.parametrize("name", BAD_EVALUATIONS)
def test_a_bad_evaluation_is_one_line_and_leaves_nothing(
    name, experts, tiny_suite, tmp_path, capsys
):
    words, message = BAD_EVALUATIONS[name]
    out = tmp_path / "scores"
    given = [*files_of(experts), f"--data.suite={tiny_suite}", f"--out={out}"]
    assert main(["evaluate", *given, *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["card", "report", "tasks", "doctor", "quickstart"])
def test_other_commands_refuse_unknown_keys(command, capsys):
    assert main([command, "--nonsense-key=1"]) == 2
    assert "No parameter named 'nonsense-key'" in capsys.readouterr().err


def test_a_pickle_is_refused(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    assert main(["card", str(tmp_path / "model.pt")]) == 2
    assert "pickle" in capsys.readouterr().err


def test_a_folder_has_no_card(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "is a folder. Name a file of it." in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_train_side_by_side_to_the_same_bytes(experts, tmp_path):
    config = str(experts / "config.yaml")
    assert main(["train", "--config", config, f"--out={tmp_path}", "--jobs=2"]) == 0
    for name in ("dots.safetensors", "stripes.safetensors"):
        assert (tmp_path / name).read_bytes() == (experts / name).read_bytes()
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_line(experts, tmp_path, capsys):
    config = str(experts / "config.yaml")
    words = ["train", "--config", config, f"--out={tmp_path / 'run'}", "--jobs=2"]
    assert main([*words, "--steps=1,2"]) == 2
    told = capsys.readouterr().err
    assert "cosine" in told
    assert told.count("mergekit-lit: error") == 1


def test_a_card_of_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.ones(50)}, {"kind": "base"})
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        describe(path)


def test_a_teacher_of_several_tasks_is_refused(tiny_suite, tmp_path, capsys):
    words = [f"--data.suite={tiny_suite}", "--data.task=all", BASE, "--steps=1"]
    words += ["--model.teacher=teacher.safetensors", f"--out={tmp_path / 'run'}"]
    assert main(["train", *words]) == 2
    assert "`data.task` must be one task with `model.teacher`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
