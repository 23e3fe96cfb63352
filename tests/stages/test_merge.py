"""The merge stage: files in, one file and its record out."""

import os
import subprocess
import sys

import pytest
import torch

from mergekit_lit.callbacks import DeltaGeometry, MergeCallback
from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_merged
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import calibration_images
from mergekit_lit.merging import in_memory, load_experts, merge
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe, merge_recipe

RESNET, VIT = "timm/test_resnet@random:0", "timm/test_vit@random:0"
TASKS = ("dots", "stripes")


@pytest.fixture(scope="module")
def family(make_family, tmp_path_factory):
    """Files of two experts of a ResNet."""
    return make_family(RESNET).save(tmp_path_factory.mktemp("resnets"))


@pytest.fixture
def calibration(tiny_suite) -> Calibration:
    return Calibration(suite=tiny_suite, options=SplitOptions(reserve=8), images=20)


def test_file_and_record(family, tmp_path):
    out = tmp_path / "runs" / "ta.safetensors"
    geometry = DeltaGeometry()
    recipe = Recipe(method="task_arithmetic", config={"scale": 0.5})
    result = merge_files(family.paths, out=out, recipe=recipe, observers=[geometry])
    assert (result.path, result.record_path) == (out, out.parent / "ta.record.json")
    assert {path.name for path in out.parent.iterdir()} == {"ta.record.json", "ta.safetensors"}

    merged = load_merged(out)
    experts = load_experts(family.paths, base=family.base)
    expected = merge(experts, "task_arithmetic", config={"scale": 0.5})
    assert merged.facts == expected.facts
    assert merged.tasks == TASKS
    assert all(torch.equal(merged.shared[n], t) for n, t in expected.shared.items())
    assert torch.equal(merged.heads["dots"]["weight"], experts.heads[0]["weight"])

    record = Record.read(result.record_path)
    assert (record.stage, record.name) == ("merge", "ta")
    assert record.inputs == {str(path): file_hash(path) for path in family.paths}
    assert record.config["recipe"]["config"] == {"scale": 0.5}
    assert record.metrics["merged"]["coefficients"] == [0.5, 0.5]
    assert record.config["observers"] == ["mergekit_lit.callbacks.delta_geometry.DeltaGeometry"]
    assert record.metrics["observers"]["DeltaGeometry"] == geometry.to_json()


def test_same_inputs_same_bytes(family, tmp_path, calibration):
    recipe = Recipe(method="travel_normalised", batch_norm="recalibrate-per-task", seed=3)
    one, two = (
        merge_files(family.paths, out=tmp_path / name, recipe=recipe, calibration=calibration)
        for name in ("a.safetensors", "b.safetensors")
    )
    assert one.path.read_bytes() == two.path.read_bytes()


@pytest.mark.parametrize("policy", ["recalibrate", "recalibrate-per-task"])
def test_recalibrated_statistics_are_those_of_the_images(family, tmp_path, calibration, policy):
    recipe = Recipe(batch_norm=policy)
    out = tmp_path / "m.safetensors"
    merge_files(family.paths, out=out, recipe=recipe, calibration=calibration)
    merged = load_merged(out)
    assert merged.facts["batch_norm"] == policy
    assert set(merged.statistics) == (set(TASKS) if policy.endswith("task") else set())
    names = [n for n, info in merged.structure.items() if info.kind == "statistic"]
    for task in TASKS:
        params = merged.for_task(task)
        assert all(float(params[name].min()) >= 0 for name in names if name.endswith("var"))
        assert any(not torch.equal(params[name], family.base.params[name]) for name in names)
    same = all(
        torch.equal(merged.for_task("dots")[n], merged.for_task("stripes")[n]) for n in names
    )
    assert same == (policy == "recalibrate")
    weights = [n for n in merged.shared if n not in names]
    plain = merge(load_experts(family.paths, base=family.base), "average").shared
    assert all(torch.equal(merged.shared[name], plain[name]) for name in weights)


def test_merging_in_memory_equals_merging_files(family, tmp_path, calibration):
    recipe = Recipe(method="travel_normalised", batch_norm="recalibrate-per-task")
    result = merge_files(
        family.paths, out=tmp_path / "m.safetensors", recipe=recipe, calibration=calibration
    )
    suite = load_suite(calibration.suite)
    before = {n: t.clone() for n, t in family.backbone.state_dict().items()}
    backbone, base = load_base_of(family.paths)
    experts = in_memory(load_experts(family.paths, base=base))
    train = {task: suite.task(task).load(calibration.options).train for task in TASKS}
    images = {task: calibration_images(x, task, count=20) for task, x in train.items()}
    merged = merge_recipe(experts, recipe, backbone, {"train": images})
    read = load_merged(result.path)
    assert merged.facts == read.facts
    for task in TASKS:
        ours = merged.for_task(task)
        assert all(torch.equal(ours[n], t) for n, t in read.for_task(task).items())
    assert all(torch.equal(t, before[n]) for n, t in family.backbone.state_dict().items())


def test_models_without_batchnorm_need_no_images(make_family, tmp_path, tiny_suite):
    vit = make_family(VIT, image_size=None).save(tmp_path)
    nothing = Calibration(suite=tiny_suite + "-that-is-not-there")
    out = tmp_path / "m.safetensors"
    recipe = Recipe(batch_norm="recalibrate")
    merge_files(vit.paths, out=out, recipe=recipe, calibration=nothing)
    assert load_merged(out).facts["batch_norm"] == "recalibrate"


@pytest.mark.slow
def test_wandb_keeps_the_merged_model_in_its_shards(family, tmp_path, offline_runs):
    recipe = Recipe(method="task_arithmetic", config={"scale": 0.25})
    out = tmp_path / "m.safetensors"
    merge_files(family.paths, out=out, recipe=recipe, max_shard_bytes=100_000, logger="wandb")
    (kept,) = offline_runs(tmp_path)
    assert (kept.config["method"], kept.config["scale"]) == ("task_arithmetic", 0.25)
    assert kept.used()[1:] == ["expert-dots", "expert-stripes"]
    files = [each["path"] for each in kept.artifact("merged-m")["manifest"]["contents"]]
    assert sorted(files) == sorted(path.name for path in tmp_path.glob("m*.safetensors*"))
    assert len(files) > 2
    assert len(list(tmp_path.rglob("coefficients_*.table.json"))) == 1


def test_a_users_callback_changes_the_merge(family, tmp_path):
    class Halve(MergeCallback):
        def on_merge_tensor(self, name, deltas):
            return deltas / 2

    halved = merge_files(family.paths, out=tmp_path / "a.safetensors", observers=[Halve()])
    recipe = Recipe(method="task_arithmetic", config={"scale": 0.25})
    quarter = merge_files(family.paths, out=tmp_path / "b.safetensors", recipe=recipe)
    one, two = load_merged(halved.path).shared, load_merged(quarter.path).shared
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])


USERS_CALLBACK = """
from mergekit_lit.callbacks import MergeCallback


class Divide(MergeCallback):
    def __init__(self, by: float = 1.0):
        self.by = by

    def on_merge_tensor(self, name, deltas):
        return deltas / self.by
"""


def test_callbacks_from_the_command_line(family, tmp_path, monkeypatch, capsys):
    (tmp_path / "users_callback.py").write_text(USERS_CALLBACK)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "m.safetensors"
    command = ["merge", *map(str, family.paths), "--out", str(out), "--method", "task_arithmetic"]
    command += ["--callbacks+=mergekit_lit.callbacks.DeltaGeometry"]
    users = "{class_path: users_callback.Divide, init_args: {by: 1e9}}"
    command += [f"--callbacks+={users}", "--scale", "1"]
    assert main(command) == 0, capsys.readouterr().err
    merged = load_merged(out)
    for name, tensor in family.base.params.items():
        torch.testing.assert_close(merged.shared[name], tensor)
    norms = Record.read(tmp_path / "m.record.json").metrics["observers"]["DeltaGeometry"]["global"]
    assert min(norms["norms"]) > 1


@pytest.mark.slow
def test_same_bytes_in_processes_with_different_hash_seeds(family, tmp_path):
    written = []
    for hash_seed in ("1", "2"):
        out = tmp_path / f"{hash_seed}.safetensors"
        command = [sys.executable, "-m", "mergekit_lit", "merge", *map(str, family.paths)]
        command += ["--out", str(out), "--method", "dare", "--drop", "0.6", "--batch_norm=average"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        written.append(out.read_bytes())
    assert written[0] == written[1]
