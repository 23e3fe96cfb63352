"""Tests of MergeModule and MergeDataModule: against torchmetrics and the plain loop."""

import copy
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import content_hash
from mergekit_lit.data.transforms import to_input
from mergekit_lit.lit.merge import MergeModule, PendingMerge
from mergekit_lit.lit.recalibration import calibration_images, recalibrate
from mergekit_lit.models.heads import apply_head
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.recipes import Recipe, merge_recipe

TASKS = ("dots", "stripes")


def _merged(base, experts):
    heads = {expert.name: expert.head for expert in experts}
    return Merged(shared=base.params, structure=base.structure, heads=heads)


def test_scores_are_torchmetrics_own_on_all_images_at_once(family, scored, merge_data):
    backbone, _, experts = family
    data = merge_data()
    module = MergeModule(backbone, {"experts": experts}, batch_norm="stored")
    logged = scored(module, data)
    found = module.results()["experts"]
    for expert, task in zip(experts, data.task_data, strict=True):
        reference = copy.deepcopy(backbone).eval()
        reference.load_state_dict(dict(expert.backbone))
        x, y = torch.from_numpy(task.test.x[:]), torch.from_numpy(task.test.y)
        with torch.no_grad():
            inputs = to_input(x, mean=backbone.mean, std=backbone.std, size=8)
            logits = apply_head(expert.head, reference(inputs))
        row = found["tasks"][task.name]
        accuracy = float(multiclass_accuracy(logits, y, 3, average="micro"))
        error = float(multiclass_calibration_error(logits.softmax(1), y, 3, n_bins=15))
        assert row["n"] == 30
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["loss"] == pytest.approx(float(cross_entropy(logits, y)), rel=1e-5)
        assert row["calibration_error"] == pytest.approx(error, abs=1e-5)
        assert logged[f"accuracy/experts/{task.name}"] == pytest.approx(accuracy)
    assert logged["loss/experts"] == pytest.approx(found["mean"]["loss"])


def test_the_plain_loop_gives_the_same_table(family, scored, merge_data):
    backbone, base, experts = family
    models = {"base": base, "experts": experts, "merged": _merged(base, experts)}
    data = merge_data(split="val")
    module = MergeModule(backbone, models)
    scored(module, data)
    loop = evaluate_models(backbone, models, data.task_data, split="val", batch=7)
    assert loop == module.results()


def test_a_merge_of_scale_zero_scores_as_the_base_does(family, merge_data):
    """The base and merges are treated alike: same images, same statistics, same head."""
    backbone, base, experts = family
    data = merge_data()
    images = {task.name: calibration_images(task.train, task.name) for task in data.task_data}
    merged = recalibrate(_merged(base, experts), images, backbone=backbone, per_task=True)
    table = evaluate_models(
        backbone, {"base": base, "merged": merged, "experts": experts}, data.task_data
    )
    assert table["base"] == table["merged"]
    stored = evaluate_models(
        backbone, {"base": base, "experts": experts}, data.task_data, batch_norm="stored"
    )
    assert stored["base"] != table["base"]


def test_pending_merges_are_made_in_sight_of_the_callbacks(family, scored, merge_data):
    backbone, base, experts = family

    class Doubles(Callback):
        def __init__(self):
            self.told = []

        def on_merge_start(self, experts, method, config):
            self.told.append((method, len(experts), dict(config)))

        def on_merge_tensor(self, name, deltas):
            self.told.append(name)
            return 2 * deltas

        def on_merge_end(self, experts, merged):
            self.told.append((merged.facts["method"], len(experts)))

    pending = PendingMerge(_gathered(base, experts), "average")
    module = MergeModule(backbone, {"average": pending})
    observer = Doubles()
    scored(module, merge_data(), callbacks=[observer])
    assert observer.told[0] == ("average", 2, {})
    assert observer.told[-1] == ("average", 2)
    name = observer.told[1]
    taus = [expert.backbone[name] - base.params[name] for expert in experts]
    moved = module.models["average"].shared[name] - base.params[name]
    assert torch.allclose(moved, taus[0] + taus[1], atol=1e-6)


@pytest.mark.parametrize("policy", ["base", "average", "recalibrate", "recalibrate-per-task"])
def test_pending_merges_are_those_of_the_merge_stage(family, policy, scored, merge_data):
    """Under every BatchNorm policy, to the last bit; the images are the training split's."""
    backbone, base, experts = family
    gathered = _gathered(base, experts)
    data = merge_data()
    images = {
        task.name: calibration_images(task.train, task.name, seed=3) for task in data.task_data
    }
    recipe = Recipe(method="task_arithmetic", config={"scale": 0.4}, batch_norm=policy, seed=3)
    expected = merge_recipe(gathered, recipe, backbone, {"train": images})
    pending = PendingMerge(gathered, recipe.method, recipe.config, policy, recipe.seed)
    module = MergeModule(
        backbone, {"m": pending, "given": replace(pending, images={"train": images})}
    )
    scored(module, data)
    for name in ("m", "given"):
        found = module.models[name]
        assert found.facts == expected.facts
        for task in TASKS:
            assert content_hash(found.for_task(task)) == content_hash(expected.for_task(task))
    assert (policy == "recalibrate-per-task") == bool(module.models["m"].statistics)


def test_a_pending_merge_without_images_of_a_task_is_told(family, scored, merge_data):
    backbone, base, experts = family
    pending = PendingMerge(_gathered(base, experts), "average", batch_norm="recalibrate")
    with pytest.raises(KeyError, match="No task with images named 'stripes'"):
        scored(MergeModule(backbone, {"m": pending}), merge_data(tasks=["dots"]))
    unknown = replace(pending, batch_norm="recalibrated")
    with pytest.raises(KeyError, match="Did you mean 'recalibrate'"):
        scored(MergeModule(backbone, {"m": unknown}), merge_data())


SCRIPT = """
import sys
from pathlib import Path
import torch
from lightning.pytorch import Trainer
from mergekit_lit.core.expert_files import save_merged
from mergekit_lit.lit.merge import MergeModule, PendingMerge
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.merging.gather import load_experts
from mergekit_lit.models.backbones import load_base

torch.set_num_threads(1)
suite, out, devices = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
backbone, base = load_base("resnet@random:0", image_size=8)
files = [out / "dots.safetensors", out / "stripes.safetensors"]
experts = load_experts(files, base=base, allow_different_base=True)
models = {
    policy: PendingMerge(experts, "average", batch_norm=policy)
    for policy in ("recalibrate", "recalibrate-per-task")
}
module = MergeModule(backbone, models)
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.test(module, datamodule=MergeDataModule(suite, batch=7, reserve=4), verbose=False)
for policy, merged in module.models.items():
    save_merged(out / f"{policy}-{trainer.global_rank}-of-{devices}.safetensors", merged)
"""


@pytest.mark.slow
def test_two_processes_make_the_merges_of_one(family, tiny_suite, tmp_path):
    for expert in family[2]:
        save_expert(tmp_path / f"{expert.name}.safetensors", expert)
    (tmp_path / "run.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for devices in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "run.py", tiny_suite, str(tmp_path), devices],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for policy in ("recalibrate", "recalibrate-per-task"):
        files = sorted(tmp_path.glob(f"{policy}-[01]-of-*.safetensors"))
        assert len(files) == 3
        assert len({file.read_bytes() for file in files}) == 1


def _gathered(base, experts):
    return Experts(
        base=base.params,
        tuned=[expert.backbone for expert in experts],
        structure=base.structure,
        cards=[expert.card for expert in experts],
        heads=[expert.head for expert in experts],
        names=[expert.name for expert in experts],
    )


def test_nothing_that_is_given_changes(family, scored, merge_data):
    backbone, base, experts = family
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    params = {name: tensor.clone() for name, tensor in base.params.items()}
    backbone.train()
    evaluate_models(backbone, {"base": base, "experts": experts}, merge_data().task_data)
    scored(MergeModule(backbone, {"base": base, "experts": experts}), merge_data())
    assert backbone.training
    assert all(torch.equal(tensor, before[n]) for n, tensor in backbone.state_dict().items())
    assert all(torch.equal(tensor, params[name]) for name, tensor in base.params.items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_an_expert_is_evaluated_on_its_own_task_alone(family, merge_data):
    backbone, _, experts = family
    table = evaluate_models(backbone, {"one": experts[1]}, merge_data().task_data)
    assert list(table["one"]["tasks"]) == ["stripes"]
