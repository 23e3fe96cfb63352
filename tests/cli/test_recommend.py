"""The command recommend: what it writes, prints and refuses."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.records import Record
from mergekit_lit.reports.commands import command_line

BASE = "timm/test_vit@random:0"
SMALL = [
    *("--space.optimizer=sgd", "--space.lr=0.003,0.03", "--space.batch=8", "--space.share=1"),
    *("--space.steps=10,20", "--space.warmup_steps=0", "--sample=2", "--ways=2"),
    *("--backbone", BASE, "--reserve=4", "--val_share=0.2", "--images=16"),
]


@pytest.fixture(autouse=True)
def told_in_one_line(monkeypatch):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget_steps=5"], "The budget must be at least"),
        ([], "`budget` (seconds) or `budget_steps` must be given"),
        (["--budget_steps=500", "--budget=5"], "must be given, and not both"),
        (["--budget_steps=500", "--val_share=0"], "'dots' has none. Raise `val_share`"),
        (["--budget_steps=500", "--tasks=dotz,stripes"], "Did you mean 'dots'"),
        (["--budget_steps=500", "--tasks=dots"], "at least 2 tasks"),
        (["--budget_steps=500", "--method=adamerging"], "`method` must need no images"),
        (["--budget_steps=500", "--method=avrage"], "Did you mean 'average'"),
        (["--budget_steps=500", "--space.lr=0"], "`space.lr` must be positive"),
        (["--budget_steps=500", "--head=frozen-ncn"], "frozen-ncm"),
        (["--budget_steps=500", "--logger=wandbb"], "wandb"),
        (["--budget_steps=500", "--ways=0"], "`ways` must be at least 1"),
        (["--budget_steps=500", "--backbone=nosuch"], "nosuch"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tiny_suite, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert main(["recommend", tiny_suite, *SMALL, *flags, f"--out={out}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert not out.exists()


def test_an_unknown_suite_is_told(tmp_path, capsys):
    words = ["recommend", "embeded8", "--budget_steps=500", f"--out={tmp_path / 'run'}"]
    assert main(words) == 2
    assert "Did you mean 'embedded8'" in capsys.readouterr().err


def test_experts_that_are_there_are_looked_at(make_family, tmp_path, capsys):
    paths = [str(path) for path in make_family(BASE).save(tmp_path).paths]
    assert main(["recommend", "--experts", *paths, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
    assert main(["recommend", f"--experts={paths[0]}", *paths[1:]]) == 0
    assert capsys.readouterr().out
    assert main(["recommend", "--experts", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_experts_of_several_bases_are_spoken_against(make_family, tmp_path, capsys):
    paths = []
    for name in ("resnet@random:0", "resnet@random:1"):
        folder = tmp_path / name.replace("@", "-").replace(":", "-")
        folder.mkdir()
        paths += [str(path) for path in make_family(name).save(folder).paths]
    assert main(["recommend", "--experts", *paths]) == 0
    told = capsys.readouterr().out
    assert "of several bases" in told
    assert "Nothing on their cards" not in told


@pytest.mark.slow
def test_a_recommendation_can_be_trained_and_goes_on_after_a_kill(tiny_suite, tmp_path, capsys):
    words = ["recommend", tiny_suite, *SMALL, "--budget_steps=200"]
    assert main([*words, f"--out={tmp_path / 'a'}", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    metrics = record["metrics"]
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written >= {"recommended.yaml", "recommend.record.json", "report.html", "probes.json"}
    assert sum(metrics["budget"][p] for p in ("probes", "validation run", "training")) <= 200
    expected = metrics["expected"]
    assert expected["low"] <= expected["accuracy"] <= expected["high"]
    chosen = metrics["recommended"]
    assert metrics["candidates"][0]["measured"] or metrics["candidates"][1]["measured"]

    # The command that the record tells finds everything done, and tells it to W&B.
    again = shlex.split(command_line(Record(**record), out=str(tmp_path / "a")))[1:]
    assert main([*again, "--json", "--logger=wandb"]) == 0
    (run,) = (tmp_path / "a" / "logs" / "recommend").glob("wandb/offline-run-*")
    (table,) = run.glob("files/media/table/candidates_*.table.json")
    assert len(json.loads(table.read_text())["data"]) == len(metrics["candidates"])
    assert json.loads(capsys.readouterr().out)["metrics"] == metrics

    # The same request in another folder, killed before the end of the probes and after them.
    for name in ("pace.json", "probes.json"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    (tmp_path / "b" / "plan.json").write_bytes((tmp_path / "a" / "plan.json").read_bytes())
    assert main([*words, f"--out={tmp_path / 'b'}", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    for part in ("recommended", "expected", "candidates", "rounds", "measured"):
        assert again[part] == metrics[part]

    # `train` takes it unchanged, and makes the very experts of the validation run.
    config = tmp_path / "a" / "recommended.yaml"
    assert main(["train", "--config", str(config), "--json"]) == 0
    trained = {card["task"]: card for card in json.loads(capsys.readouterr().out)}
    assert {card["steps"] for card in trained.values()} == {chosen["steps"]}
    for task, file in metrics["experts"].items():
        mine = Path(yaml.safe_load(config.read_text())["out"]) / f"{task}.safetensors"
        assert load_expert(file).card == load_expert(mine).card
        assert Path(file).read_bytes() == mine.read_bytes()

    # Another request does not mix with it.
    other = [*words[:-1], "--budget_steps=300"]
    assert main([*other, f"--out={tmp_path / 'a'}"]) == 2
    assert "`out` must be a new folder or that of this very request" in capsys.readouterr().err
