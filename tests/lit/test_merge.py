"""Tests of MergeModule and MergeDataModule: against torchmetrics and the plain loop."""

import copy
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Expert, Experts, Merged
from mergekit_lit.core.params import add, content_hash
from mergekit_lit.data.splits import Images, TaskData
from mergekit_lit.data.transforms import to_input
from mergekit_lit.lit.evaluation import entries_for
from mergekit_lit.lit.merge import MergeModule, PendingMerge
from mergekit_lit.lit.passes import statistics_of
from mergekit_lit.lit.recalibration import calibration_images, recalibrate, task_statistics
from mergekit_lit.lit.suite_data import BatchShare, MergeDataModule
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import apply_head
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.recipes import Recipe, merge_recipe

TASKS = ("dots", "stripes")


@pytest.fixture(scope="module")
def family():
    """A small backbone, its base, and an expert of each tiny task with a random head."""
    backbone, base = load_base("resnet@random:0", image_size=8)
    return backbone, base, [_expert(base, backbone.features, task) for task in TASKS]


def _expert(base, features, task, size=0.02):
    draw = torch.Generator().manual_seed(len(task))
    step = {
        name: size * torch.randn(tensor.shape, generator=draw)
        for name, tensor in base.params.items()
        if base.structure[name].is_merged
    }
    head = {"weight": torch.randn(3, features, generator=draw), "bias": torch.zeros(3)}
    card = Card(task=task, base=base.name, backbone=base.backbone, image_size=8)
    return Expert(add(base.params, step), head, base.structure, card)


def _merged(base, experts):
    heads = {expert.name: expert.head for expert in experts}
    return Merged(shared=base.params, structure=base.structure, heads=heads)


def _data(tiny_suite, **options):
    data = MergeDataModule(tiny_suite, **{"batch": 7, "reserve": 4, **options})
    data.setup()
    return data


def _task(n=40, classes=3, **labels):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    images = Images(x, np.arange(n) % labels.get("label", classes))
    return TaskData(
        name="dots",
        suite="tiny",
        classes=tuple("abcdefgh"[:classes]),
        train=images,
        val=images,
        test=images,
        reserve=images,
        split_hash="0",
    )


def test_scores_are_torchmetrics_own_on_all_images_at_once(family, tiny_suite, scored):
    backbone, _, experts = family
    data = _data(tiny_suite)
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


def test_the_plain_loop_gives_the_same_table(family, tiny_suite, scored):
    backbone, base, experts = family
    models = {"base": base, "experts": experts, "merged": _merged(base, experts)}
    data = _data(tiny_suite, split="val")
    module = MergeModule(backbone, models)
    scored(module, data)
    loop = evaluate_models(backbone, models, data.task_data, split="val", batch=7)
    assert loop == module.results()


def test_a_merge_of_scale_zero_scores_as_the_base_does(family, tiny_suite):
    """The base and merges are treated alike: same images, same statistics, same head."""
    backbone, base, experts = family
    data = _data(tiny_suite)
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


def test_shares_of_batches_join_to_the_table_of_one_process(family, tiny_suite, scored):
    """What two processes would gather, in the order in which they would, is exactly the same."""
    backbone, _, experts = family
    data = _data(tiny_suite)
    whole = MergeModule(backbone, {"experts": experts})
    scored(whole, data)

    class Shares(MergeDataModule):
        def test_dataloader(self):
            return [_Shares(task.test, self.batch) for task in self.task_data]

    shares = Shares(tiny_suite, batch=7, reserve=4)
    joined = MergeModule(backbone, {"experts": experts})
    scored(joined, shares)
    assert joined.results() == whole.results()


class _Shares:
    """The batches of rank 1 of 2, then those of rank 0."""

    def __init__(self, images, batch):
        self.parts = [BatchShare(images, batch=batch, rank=rank, world=2) for rank in (1, 0)]

    def __len__(self):
        return sum(len(part) for part in self.parts)

    def __iter__(self):
        for part in self.parts:
            yield from part


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 30])
def test_each_image_goes_to_one_process_in_the_batches_of_one(n, world):
    images = _task(n).test
    shares = [list(BatchShare(images, batch=7, rank=r, world=world)) for r in range(world)]
    batches = {int(b[2][0]): b[2].tolist() for share in shares for b in share}
    alone = [b[2].tolist() for b in BatchShare(images, batch=7)]
    assert [batches[start] for start in sorted(batches)] == alone
    assert sum(len(share) for share in shares) == len(alone)


@pytest.mark.parametrize(("batch", "shares"), [(64, [[1, 0], [0, 1]]), (20, [[1, 1], [1, 1]])])
def test_processes_take_turns_over_the_batches_of_all_tasks(tiny_suite, batch, shares):
    for rank, expected in enumerate(shares):
        data = _data(tiny_suite, batch=batch)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        assert [len(share) for share in data.test_dataloader()] == expected


def test_more_processes_than_batches_are_refused(tiny_suite):
    data = _data(tiny_suite, batch=64)
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ValueError, match="each of 3 processes a batch, but 64 makes 2 in all"):
        data.test_dataloader()


def test_pending_merges_are_made_in_sight_of_the_callbacks(family, tiny_suite, scored):
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
    scored(module, _data(tiny_suite), callbacks=[observer])
    assert observer.told[0] == ("average", 2, {})
    assert observer.told[-1] == ("average", 2)
    name = observer.told[1]
    taus = [expert.backbone[name] - base.params[name] for expert in experts]
    moved = module.models["average"].shared[name] - base.params[name]
    assert torch.allclose(moved, taus[0] + taus[1], atol=1e-6)


@pytest.mark.parametrize("policy", ["base", "average", "recalibrate", "recalibrate-per-task"])
def test_pending_merges_are_those_of_the_merge_stage(family, tiny_suite, policy, scored):
    """Under every BatchNorm policy, to the last bit; the images are the training split's."""
    backbone, base, experts = family
    gathered = _gathered(base, experts)
    data = _data(tiny_suite)
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


def test_a_pending_merge_without_images_of_a_task_is_told(family, tiny_suite, scored):
    backbone, base, experts = family
    pending = PendingMerge(_gathered(base, experts), "average", batch_norm="recalibrate")
    with pytest.raises(KeyError, match="No task with images named 'stripes'"):
        scored(MergeModule(backbone, {"m": pending}), _data(tiny_suite, tasks=["dots"]))
    unknown = replace(pending, batch_norm="recalibrated")
    with pytest.raises(KeyError, match="Did you mean 'recalibrate'"):
        scored(MergeModule(backbone, {"m": unknown}), _data(tiny_suite))


def test_evaluation_estimates_the_statistics_that_the_head_was_fitted_under(family, tiny_suite):
    backbone, base, experts = family
    (data, _) = _data(tiny_suite).task_data
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    expected = {**base.params, **task_statistics(start, data)}
    heads = {"dots": experts[0].head}
    (entry,) = entries_for(
        {"base": base}, data, backbone, heads=heads, batch_norm="recalibrate-per-task"
    )
    assert content_hash(entry.params) == content_hash(expected)


def test_large_tasks_are_calibrated_on_a_seeded_part():
    train = _task(40).train
    assert calibration_images(train, "dots", count=40) is train
    parts = [calibration_images(train, "dots", count=10, seed=seed).x[:] for seed in (0, 0, 1)]
    assert len(parts[0]) == 10
    assert np.array_equal(parts[0], parts[1])
    assert not np.array_equal(parts[0], parts[2])


def test_pooled_statistics_are_those_of_all_images_at_once(family):
    """Two pools give what one pool of the same images gives."""
    backbone, base, _ = family
    one, two = _task(300).train, _task(17).train
    joined = Images(np.concatenate([one.x, two.x]), np.concatenate([one.y, two.y]))
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    apart, whole = statistics_of(start, [one, two]), statistics_of(start, joined)
    assert content_hash(apart) == content_hash(whole)


def test_statistics_do_not_depend_on_the_number_of_threads(family, threads):
    backbone, base, _ = family
    start = copy.deepcopy(backbone).eval()
    start.load_state_dict(dict(base.params))
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(content_hash(statistics_of(start, _task(100).train)))
    assert found[0] == found[1]


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


def test_nothing_that_is_given_changes(family, tiny_suite, scored):
    backbone, base, experts = family
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    params = {name: tensor.clone() for name, tensor in base.params.items()}
    backbone.train()
    evaluate_models(backbone, {"base": base, "experts": experts}, _data(tiny_suite).task_data)
    scored(MergeModule(backbone, {"base": base, "experts": experts}), _data(tiny_suite))
    assert backbone.training
    assert all(torch.equal(tensor, before[n]) for n, tensor in backbone.state_dict().items())
    assert all(torch.equal(tensor, params[name]) for name, tensor in base.params.items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_an_expert_is_evaluated_on_its_own_task_alone(family, tiny_suite):
    backbone, _, experts = family
    table = evaluate_models(backbone, {"one": experts[1]}, _data(tiny_suite).task_data)
    assert list(table["one"]["tasks"]) == ["stripes"]


def _head(expert, classes):
    weight = torch.zeros(classes, expert.head["weight"].shape[1])
    return replace(expert, head={"weight": weight, "bias": torch.zeros(classes)})


BAD_MODELS = {
    "label out of range": (
        lambda of: ({"experts": [of.expert]}, _task(label=4)),
        ValueError,
        r"Labels of 'dots' must lie in \[0, 3\), .* but one is 3",
    ),
    "head of other classes": (
        lambda of: ({"experts": [_head(of.expert, 2)]}, _task()),
        ValueError,
        r"head of 'experts' for 'dots' must have shape \(3, \d+\).*has \(2, ",
    ),
    "no head": (
        lambda of: ({"base": of.base}, _task()),
        KeyError,
        "'base' needs a head for task 'dots', but there are heads for: none",
    ),
    "merged without head": (
        lambda of: (
            {"m": Merged(of.base.params, of.base.structure, heads={"dogs": of.expert.head})},
            _task(),
        ),
        KeyError,
        "'m' needs a head for task 'dots', but there are heads for: dogs",
    ),
    "empty split": (
        lambda of: ({"experts": [of.expert]}, replace(_task(), val=_task(0).val)),
        ValueError,
        "val split of 'dots' must hold an image, but is empty",
    ),
    "other names": (
        lambda of: (
            {"experts": [replace(of.expert, backbone={"a": torch.zeros(1)})]},
            _task(),
        ),
        ValueError,
        "Model 'experts' and the base differ in .* parameter names",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_told_in_one_line(family, make, error, message):
    backbone, base, experts = family
    models, task = make(SimpleNamespace(base=base, expert=experts[0]))
    with pytest.raises(error, match=message) as caught:
        evaluate_models(backbone, models, [task])
    assert "\n" not in str(caught.value)


BAD_DATA = {
    "unknown task": ({"tasks": ["dot"]}, KeyError, "Did you mean 'dots'"),
    "unknown split": ({"split": "tests"}, KeyError, "No split named 'tests'. Did you mean 'test'"),
    "no task": ({"tasks": []}, ValueError, "must name each task once"),
    "twice": ({"tasks": ["dots", "dots"]}, ValueError, "must name each task once"),
    "batch": ({"batch": 0}, ValueError, "`batch` must be at least 1, but is 0"),
    "empty val": ({"val_share": 0.0, "split": "val"}, ValueError, "val split of 'dots' must hold"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_told_in_one_line(tiny_suite, options, error, message):
    with pytest.raises(error, match=message) as caught:
        _data(tiny_suite, **options)
    assert "\n" not in str(caught.value)


def test_unknown_policy_and_split_are_told(family):
    backbone, _, experts = family
    with pytest.raises(KeyError, match=r"named 'store'\. Did you mean 'stored'"):
        evaluate_models(backbone, {"experts": experts}, [_task()], batch_norm="store")
    with pytest.raises(KeyError, match="No split named 'valid'"):
        evaluate_models(backbone, {"experts": experts}, [_task()], split="valid")


def test_another_data_module_is_refused(family, scored):
    with pytest.raises(TypeError, match="must be tested on a MergeDataModule"):
        scored(MergeModule(family[0], {"experts": family[2]}), None)
