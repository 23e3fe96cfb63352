"""The merge stage: files in, one file and its record out, or one line and nothing."""

import errno
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.callbacks import DeltaGeometry, MergeCallback
from mergekit_lit.cli import main
from mergekit_lit.core import files
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Expert, load_merged, save_expert
from mergekit_lit.core.files import file_hash
from mergekit_lit.core.params import add
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import calibration_images
from mergekit_lit.merging import in_memory, load_experts, merge
from mergekit_lit.models.backbones import Backbone, load_base
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe, merge_recipe

RESNET, VIT = "timm/test_resnet@random:0", "timm/test_vit@random:0"
TASKS = ("dots", "stripes")


@dataclass
class Family:
    """A base and files of two experts."""

    backbone: Backbone
    base: Base
    paths: list[Path]


def tuned(base: Base, features: int, task: str, spec: str) -> Expert:
    draw = torch.Generator().manual_seed(len(task))
    step = {
        name: 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in base.params.items()
        if tensor.is_floating_point() and not name.endswith("running_var")
    }
    head = {"weight": torch.randn(3, features, generator=draw), "bias": torch.zeros(3)}
    card = Card(
        task=task,
        base=spec,
        base_hash=base.content,
        backbone=base.backbone,
        image_size=base.image_size,
        travel=float(len(task)),
    )
    return Expert(add(base.params, step), head, base.structure, card)


def make_family(spec: str, folder: Path, image_size: int | None) -> Family:
    backbone, base = load_base(spec, image_size=image_size)
    family = Family(backbone, base, [folder / f"{task}.safetensors" for task in TASKS])
    for task, path in zip(TASKS, family.paths, strict=True):
        save_expert(path, tuned(base, backbone.features, task, spec))
    return family


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    return make_family(RESNET, tmp_path_factory.mktemp("resnets"), 32)


@pytest.fixture
def calibration(tiny_suite) -> Calibration:
    return Calibration(suite=tiny_suite, options=SplitOptions(reserve=8), images=20)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_and_record(family, tmp_path):
    out = tmp_path / "runs" / "ta.safetensors"
    geometry = DeltaGeometry()
    recipe = Recipe(method="task_arithmetic", config={"scale": 0.5})
    result = merge_files(family.paths, out=out, recipe=recipe, observers=[geometry])
    assert (result.path, result.record_path) == (out, out.parent / "ta.record.json")
    assert names_in(out.parent) == ["ta.record.json", "ta.safetensors"]

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


def test_models_without_batchnorm_need_no_images(tmp_path, tiny_suite):
    vit = make_family(VIT, tmp_path, None)
    nothing = Calibration(suite=tiny_suite + "-that-is-not-there")
    out = tmp_path / "m.safetensors"
    recipe = Recipe(batch_norm="recalibrate")
    merge_files(vit.paths, out=out, recipe=recipe, calibration=nothing)
    assert load_merged(out).facts["batch_norm"] == "recalibrate"


@pytest.mark.slow
def test_wandb_keeps_the_merged_model(family, tmp_path):
    merge_files(family.paths, out=tmp_path / "m.safetensors", logger="wandb")
    (run,) = (tmp_path / "logs" / "m" / "wandb").glob("offline-run-*")
    assert len(list(run.rglob("results_*.table.json"))) == 1
    (stored,) = run.glob("run-*.wandb")
    deadline = time.monotonic() + 60
    while b"merged" not in (text := stored.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"base_hash" in text


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


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": (
        {"recipe": Recipe(method="avrage")},
        KeyError,
        "No merge method named 'avrage'. Did you mean 'average'?",
    ),
    "parameter": (
        {"recipe": Recipe(method="task_arithmetic", config={"scael": 1})},
        KeyError,
        "No parameter of 'task_arithmetic' named 'scael'. Did you mean 'scale'?",
    ),
    "lambda": (
        {"recipe": Recipe(method="task_arithmetic", config={"scale": -0.5})},
        ValueError,
        "`scale` must be at least 0, but is -0.5.",
    ),
    "lambda nan": (
        {"recipe": Recipe(method="task_arithmetic", config={"scale": float("nan")})},
        TypeError,
        "`scale` of 'task_arithmetic' must be a finite number, but is nan.",
    ),
    "weights": (
        {"recipe": Recipe(method="weighted_average", config={"weights": [1.0]})},
        ValueError,
        "`weights` must hold one number for each of the 2 experts (dots, stripes), but holds 1.",
    ),
    "policy": (
        {"recipe": Recipe(batch_norm="recalibrat")},  # type: ignore[arg-type]
        KeyError,
        "No BatchNorm policy named 'recalibrat'. Did you mean 'recalibrate'?",
    ),
    "no suite": (
        {"recipe": Recipe(batch_norm="recalibrate")},
        ValueError,
        "must be told a suite to take training images from, but got none",
    ),
    "one image": (
        {"calibration": Calibration(suite="embedded8", images=1)},
        ValueError,
        "`images` must be at least 2, to have a variance, but is 1.",
    ),
    "unknown suite": (
        {
            "recipe": Recipe(batch_norm="recalibrate"),
            "calibration": Calibration(suite="embeded8"),
        },
        KeyError,
        "Did you mean 'embedded8'?",
    ),
    "unknown task": (
        {
            "recipe": Recipe(batch_norm="recalibrate"),
            "calibration": Calibration(suite="embedded8"),
        },
        KeyError,
        "No task of suite 'embedded8' named 'dots'.",
    ),
    "unknown base": ({"base": "resnt"}, KeyError, "resnt"),
    "another base": (
        {"base": "timm/test_resnet@random:1"},
        ValueError,
        ". Merge them as they are with `--allow_different_base true`.",
    ),
    "another architecture": (
        {"base": VIT, "allow_different_base": True},
        ValueError,
        "and the base differ in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(family, tmp_path, case):
    options, error, message = BAD[case]
    with pytest.raises(error) as caught:
        merge_files(family.paths, out=tmp_path / "deep" / "m.safetensors", **options)
    text = str(caught.value.args[0])
    assert message in text
    assert "\n" not in text
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.pt", "`out` must end in .safetensors, but is"),
        ("folder.safetensors", "`out` must name a file, but .* is a folder"),
    ],
)
def test_bad_output_names(family, tmp_path, name, message):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=message):
        merge_files(family.paths, out=tmp_path / name)


def test_a_base_is_never_overwritten(family, tmp_path):
    plain = tmp_path / "base.safetensors"
    save_file(dict(family.base.params), plain)
    before = plain.read_bytes()
    for base in (str(plain), f"{RESNET.partition('@')[0]}@{plain}", str(tmp_path)):
        with pytest.raises(ValueError, match="is one of the experts or the base"):
            merge_files(family.paths, out=plain, base=base)
    assert plain.read_bytes() == before


def test_the_record_of_another_stage_is_never_overwritten(family, tmp_path):
    Record(stage="evaluate", name="m", config={}).write(tmp_path / "m.record.json")
    with pytest.raises(ValueError, match="must not be overwritten: it is of the stage 'evaluate'"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == ["m.record.json"]


def test_an_expert_is_never_overwritten(family):
    before = family.paths[0].read_bytes()
    detour = family.paths[0].parent / "." / ".." / family.paths[0].parent.name / TASKS[0]
    with pytest.raises(ValueError, match="is one of the experts"):
        merge_files(family.paths, out=detour.with_suffix(".safetensors"))
    assert family.paths[0].read_bytes() == before


def test_full_disk(family, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == []


def test_a_record_that_cannot_be_written_keeps_the_model_away(family, tmp_path):
    (tmp_path / "m.record.json").mkdir()
    with pytest.raises(OSError, match=r"m\.record\.json': Is a directory"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == ["m.record.json"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_model_that_cannot_be_written_leaves_the_earlier_pair(
    family, tmp_path, monkeypatch, earlier
):
    out = tmp_path / "m.safetensors"
    if earlier:
        merge_files(family.paths, out=out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mergekit_lit.stages.merge.save_merged", full)
    with pytest.raises(OSError, match="No space left"):
        merge_files(family.paths, out=out, recipe=Recipe(method="task_arithmetic"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "must name its base, but does not. Give `base`."),
        ("my-base", "The base 'my-base' that the card of .* names must be loadable here"),
    ],
)
def test_cards_whose_base_cannot_be_found(family, tmp_path, spec, message):
    expert = tuned(family.base, family.backbone.features, "dots", RESNET)
    path = tmp_path / "e.safetensors"
    save_expert(path, replace(expert, card=replace(expert.card, base=spec)))
    with pytest.raises(ValueError, match=message):
        merge_files([path], out=tmp_path / "m.safetensors")
    merge_files([path], out=tmp_path / "m.safetensors", base=RESNET)
    assert load_merged(tmp_path / "m.safetensors").tasks == ("dots",)
