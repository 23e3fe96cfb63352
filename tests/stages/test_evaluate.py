"""Tests of the evaluation stage: files in, one record out, whatever the number of processes."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_expert, save_merged
from mergekit_lit.core.experts import Expert, Merged
from mergekit_lit.core.params import add
from mergekit_lit.core.records import Record
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.models.backbones import load_base
from mergekit_lit.stages.evaluate import evaluate_files

BASE = "resnet@random:0"
TASKS = ("dots", "stripes")


@pytest.fixture(scope="module")
def family():
    """A base, and an expert of each tiny task with a random head."""
    backbone, base = load_base(BASE, image_size=8)
    return base, [_expert(base, backbone.features, task, 0.01) for task in TASKS]


def _expert(base, features, task, size):
    draw = torch.Generator().manual_seed(len(task))
    step = {
        name: size * torch.randn(tensor.shape, generator=draw)
        for name, tensor in base.params.items()
        if base.structure[name].is_merged
    }
    head = {"weight": torch.randn(3, features, generator=draw), "bias": torch.zeros(3)}
    card = Card(
        task=task,
        base=base.name,
        base_hash=base.content,
        backbone=base.backbone,
        image_size=8,
        head="frozen-ncm",
    )
    return Expert(add(base.params, step), head, base.structure, card)


@pytest.fixture
def files(family, tmp_path):
    """Files of both experts and of a merge of scale zero."""
    base, experts = family
    paths = [tmp_path / f"{expert.name}.safetensors" for expert in experts]
    for path, expert in zip(paths, experts, strict=True):
        save_expert(path, expert)
    facts = {"method": "average", "backbone": base.backbone, "image_size": 8, "config": {}}
    heads = {expert.name: expert.head for expert in experts}
    merged = tmp_path / "average.safetensors"
    save_merged(merged, Merged(base.params, base.structure, heads=heads, facts=facts))
    return [*paths, merged]


@pytest.mark.slow
def test_wandb_keeps_one_run_of_an_evaluation(files, tiny_suite, tmp_path, offline_runs):
    out = tmp_path / "out"
    evaluate_files([BASE, *files], data=_data(tiny_suite), out=out, logger="wandb")
    (kept,) = offline_runs(out)
    assert kept.made() == []
    assert kept.used()[1:] == ["expert-dots", "expert-stripes", "merged-average"]
    (wide,) = [json.loads(path.read_text()) for path in out.rglob("accuracy_*.table.json")]
    assert wide["columns"] == ["model", "dots", "stripes", "(mean)"]
    assert [row[0] for row in wide["data"]] == ["base", "average", "experts"]
    assert wide["data"][1][3] == pytest.approx(sum(wide["data"][1][1:3]) / 2)


def test_wandb_without_a_folder_is_refused_before_anything_is_read(tiny_suite):
    with pytest.raises(ValueError, match="`out` is not given"):
        evaluate_files(["nowhere.safetensors"], data=_data(tiny_suite), logger="wandb")


@pytest.mark.parametrize("name", ["", "../x", "a/b"])
def test_names_stay_in_their_folder(tiny_suite, tmp_path, name):
    with pytest.raises(ValueError, match="`name` must be the stem of a file"):
        evaluate_files([BASE], data=_data(tiny_suite), out=tmp_path, name=name)


def _data(suite, **options):
    return MergeDataModule(suite, **{"reserve": 4, "batch": 7, **options})


def test_files_become_a_record(files, tiny_suite, tmp_path):
    record = evaluate_files([BASE, *files], data=_data(tiny_suite), out=tmp_path / "out")
    written = Record.read(tmp_path / "out" / "evaluation.record.json")
    assert json.loads(json.dumps(record.metrics)) == written.metrics
    models = written.metrics["models"]
    assert {name: entry["kind"] for name, entry in models.items()} == {
        "base": "base",
        "experts": "experts",
        "average": "merged",
    }
    assert models["average"]["method"] == "average"
    assert written.outputs == ["evaluation.record.json", "evaluation.csv"]
    with (tmp_path / "out" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {(r["model"], r["task"]): float(r["accuracy"]) for r in rows}
    assert len(told) == len(rows) == 3 * 3
    assert told["average", "dots"] == models["average"]["tasks"]["dots"]["accuracy"]
    assert told["experts", "(mean)"] == models["experts"]["mean"]["accuracy"]
    for entry in models.values():
        assert list(entry["tasks"]) == list(TASKS)
        row = entry["tasks"]["dots"]
        assert row["n"] == 30
        assert row["accuracy_interval"][0] <= row["accuracy"] <= row["accuracy_interval"][1]
    assert models["experts"]["mean"]["normalised_accuracy"] == 1.0
    assert written.config["tasks"] == list(TASKS)
    assert written.config["split"] == "test"
    assert set(written.inputs) == {BASE, *map(str, files)}
    assert written.metrics["splits"]["dots"]["n"] == 30


def test_a_model_that_overflows_is_warned_of(family, tiny_suite, tmp_path):
    base, experts = family
    facts = {"method": "x", "backbone": base.backbone, "image_size": 8, "config": {}}
    huge = {n: 1e30 * t if t.is_floating_point() else t for n, t in base.params.items()}
    heads = {expert.name: expert.head for expert in experts}
    save_merged(tmp_path / "huge.safetensors", Merged(huge, base.structure, heads, facts=facts))
    record = evaluate_files([tmp_path / "huge.safetensors"], data=_data(tiny_suite), out=tmp_path)
    row = record.metrics["models"]["huge"]["mean"]
    assert (row["accuracy"], row["loss"], row["not_finite"]) == (0, None, row["n"])
    (line,) = record.metrics["warnings"]
    assert "'huge' has logits that are not finite on 60 of 60 images of 'dots', 'stripes'" in line


def test_stored_statistics_are_the_files_own(files, tiny_suite):
    data, models = _data(tiny_suite, tasks=["dots"]), [BASE, files[0], files[2]]
    stored = evaluate_files(models, data=data, batch_norm="stored").metrics["models"]
    # The file of scale zero carries the base's statistics, and so scores as the base does.
    assert stored["base"]["tasks"] == stored["average"]["tasks"]
    again = evaluate_files(models, data=data).metrics["models"]
    losses = [[found[name]["mean"]["loss"] for found in (stored, again)] for name in stored]
    assert dict(zip(stored, [one == other for one, other in losses], strict=True)) == {
        "average": True,
        "base": False,
        "experts": False,
    }


def test_the_record_of_another_stage_is_never_overwritten(tiny_suite, tmp_path):
    path = tmp_path / "mnist.record.json"
    Record(stage="train", name="mnist", config={}).write(path)
    with pytest.raises(ValueError, match="must not be overwritten: it is of the stage 'train'"):
        evaluate_files([BASE], data=_data(tiny_suite), out=tmp_path, name="mnist")
    assert Record.read(path).stage == "train"


def test_some_tasks_alone(files, tiny_suite):
    record = evaluate_files([BASE, *files[1:]], data=_data(tiny_suite, tasks=["stripes"]))
    models = record.metrics["models"]
    assert {name: list(entry["tasks"]) for name, entry in models.items()} == {
        name: ["stripes"] for name in ("base", "experts", "average")
    }


def test_an_expert_is_scored_or_refused(files, tiny_suite):
    with pytest.raises(ValueError, match=r"`data.tasks` \(stripes\), but one is of 'dots'"):
        evaluate_files(files, data=_data(tiny_suite, tasks=["stripes"]))


def test_several_experts_of_one_task_are_models_of_their_own(family, files, tiny_suite, tmp_path):
    path = tmp_path / "dots-step9.safetensors"
    save_expert(path, family[1][0])
    record = evaluate_files([*files[:2], path], data=_data(tiny_suite))
    assert set(record.metrics["models"]) == {"dots", "stripes", "dots-step9"}
    assert any("'dots', have several experts" in line for line in record.metrics["warnings"])


def _foreign(path):
    save_file({"a": torch.zeros(1)}, path)
    return path


BAD = {
    "nothing": ([], ValueError, "`models` must name at least one"),
    "missing": (["no.safetensors"], FileNotFoundError, "No file 'no.safetensors'"),
    "unknown base": (["resnett"], KeyError, "Did you mean 'resnet"),
    "foreign": (lambda of: [_foreign(of.tmp / "x.safetensors")], ValueError, "kind 'foreign'"),
    "no head": ([BASE], KeyError, "'base' needs a head for task 'dots'"),
    "other architecture": (
        lambda of: [*of.files, "vit@random:0"],
        ValueError,
        "must share backbone and image size, but .* is resnet at 8 px and .* is vit at",
    ),
    "unknown policy": (
        lambda of: of.files,
        KeyError,
        "No BatchNorm policy named 'recalibrate'. Did you mean 'recalibrate-per-task'",
    ),
}


@pytest.mark.parametrize(("models", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(files, tiny_suite, tmp_path, models, error, message):
    of = SimpleNamespace(files=files, tmp=tmp_path)
    given = models(of) if callable(models) else models
    policy = "recalibrate" if "policy" in message else "stored"
    with pytest.raises(error, match=message) as caught:
        evaluate_files(given, data=_data(tiny_suite), batch_norm=policy, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_expert_of_no_task_of_the_suite_is_refused(family, tiny_suite, tmp_path):
    expert = family[1][0]
    path = tmp_path / "dotz.safetensors"
    save_expert(path, replace(expert, card=replace(expert.card, task="dotz")))
    with pytest.raises(KeyError, match="Did you mean 'dots'"):
        evaluate_files([path], data=_data(tiny_suite))


_SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.stages.evaluate import evaluate_files
suite, devices, out, *models = sys.argv[1:]
trainer = {"accelerator": "cpu", "devices": int(devices)}
if int(devices) > 1:
    trainer["strategy"] = "ddp"
for batch in (20, 64):
    data = MergeDataModule(suite, reserve=4, batch=batch)
    evaluate_files(models, data=data, out=Path(out), name=str(batch), trainer=trainer)
"""


@pytest.mark.slow
def test_two_processes_give_exactly_the_metrics_of_one(files, tiny_suite, tmp_path):
    """In batches of 20 each process has images of both tasks; in batches of 64 of one alone."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    found = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        command = [sys.executable, script, tiny_suite, devices, out, BASE, *files]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=500, cwd=tmp_path)
        records = [json.loads((out / f"{name}.record.json").read_text()) for name in ("20", "64")]
        found.append([json.dumps(record["metrics"], sort_keys=True) for record in records])
    assert found[0] == found[1]
