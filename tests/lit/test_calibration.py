"""What methods that look at images are given: the right images, labels and statistics."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_merged, save_expert
from mergekit_lit.core.experts import Base, Expert, Experts, Merged
from mergekit_lit.core.permutations import permutation_sizes
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import Images, SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.evaluation import entries_for, predict
from mergekit_lit.lit.passes import pixels
from mergekit_lit.lit.recalibration import images_by_split, merge_calibrated, splits_needed
from mergekit_lit.merging.methods.alignment import permuted
from mergekit_lit.models.heads import apply_head

BASE = "timm/test_resnet@random:0"
TASKS = ("dots", "stripes")
FEW = {
    "fisher": {"samples": 8},
    "mats": {"samples": 8, "iterations": 2},
    "adamerging": {"steps": 2},
    "surgery": {"steps": 2},
}
LOOKING = [
    method.name
    for method in MERGE_METHODS
    # Alignment asks for axes, which this encoder's structure does not have.
    if method.facts["data"] not in ("none", "cards") and method.facts["family"] != "alignment"
]


@pytest.fixture(scope="module")
def family(make_family):
    """Return a backbone with BatchNorm, its base, and two experts of it."""
    made = make_family(BASE)
    return made.backbone, made.base, made.experts


@pytest.fixture(scope="module")
def gathered(family):
    _, base, experts = family
    return Experts(
        base=base.params,
        tuned=[expert.backbone for expert in experts],
        structure=base.structure,
        cards=[expert.card for expert in experts],
        heads=[expert.head for expert in experts],
        names=list(TASKS),
    )


@pytest.fixture(scope="module")
def data(tiny_suite):
    return [load_suite(tiny_suite).task(task).load(SplitOptions(reserve=8)) for task in TASKS]


def images_of(data, split="train", count=20):
    return images_by_split(data, [split], count=count)[split]


def test_batches_are_the_images_and_test_labels_are_withheld(family, gathered, data):
    backbone, _, _ = family
    images = images_of(data, "test-unlabelled", 30)
    for split in ("train", "test-unlabelled"):
        given = calibration_on(images, gathered, backbone=backbone, split=split)
        batch = given.samples["dots"].take(torch.tensor([4, 1]))
        chosen = images["dots"].subset(np.array([4, 1]))
        torch.testing.assert_close(batch.inputs, pixels(backbone, torch.from_numpy(chosen.x[:])))
        if split == "train":
            assert batch.labels.tolist() == chosen.y.tolist()
        else:
            assert batch.labels is None


def test_splits_are_the_tasks_own(data):
    found = images_by_split(data, ["train", "val", "test-unlabelled"])
    task = data[0]
    for split, whole in zip(found, (task.train, task.val, task.test), strict=True):
        assert np.array_equal(found[split]["dots"].y, whole.y)


@pytest.mark.parametrize("policy", ["base", "average", "recalibrate", "recalibrate-per-task"])
def test_the_merged_model_is_looked_at_as_the_policy_says(family, gathered, data, policy):
    backbone, base, _ = family
    given = calibration_on(
        images_of(data), gathered, backbone=backbone, split="train", batch_norm=policy
    )
    batches = {task: given.samples[task].take(torch.arange(10)) for task in TASKS}
    with torch.no_grad():
        found = given.merged_features(gathered.tuned[0], batches)
    statistics = [n for n, info in base.structure.items() if info.kind == "statistic"]
    inputs = [batch.inputs for batch in batches.values()]
    with torch.no_grad():
        if policy.startswith("recalibrate"):
            pools = [torch.cat(inputs)] if policy == "recalibrate" else inputs
            expected = torch.cat([_under_batch(backbone, gathered.tuned[0], x) for x in pools])
        else:
            sources = [gathered.base] if policy == "base" else gathered.tuned
            stored = {n: torch.stack([s[n] for s in sources]).mean(0) for n in statistics}
            params = {**gathered.tuned[0], **stored}
            expected = torch.cat([given.expert.features(params, x) for x in inputs])
    torch.testing.assert_close(torch.cat(list(found.values())), expected, atol=1e-5, rtol=1e-5)


def _under_batch(backbone, params, x):
    module = copy.deepcopy(backbone)
    module.load_state_dict(dict(params))
    return module.train()(x)


@pytest.mark.parametrize("policy", ["average", "recalibrate-per-task"])
@pytest.mark.parametrize("method", LOOKING)
def test_every_method_that_looks_runs_on_a_resnet(family, gathered, data, method, policy):
    backbone, base, _ = family
    needed = splits_needed(method, policy, base.structure)
    images = images_by_split(data, needed, count=20)
    merged = merge_calibrated(
        gathered,
        method,
        images,
        backbone=backbone,
        config=FEW.get(method, {}),
        batch_norm=policy,
    )
    assert merged.facts["data"] in images
    assert merged.facts["batch_norm"] == policy
    assert (set(merged.statistics) == set(TASKS)) == (policy == "recalibrate-per-task")


def test_evaluation_applies_the_adapter(family, data):
    backbone, base, experts = family
    adapter = {"down": torch.ones(1, backbone.features), "up": torch.ones(backbone.features, 1)}
    merged = Merged(
        shared=base.params,
        structure=base.structure,
        heads={"dots": experts[0].head},
        adapters={"dots": adapter},
    )
    (entry,) = entries_for({"m": merged}, data[0], backbone, heads={})
    x = pixels(backbone, torch.from_numpy(data[0].test.x[:4]))
    with torch.no_grad():
        z = backbone.eval()(x)
        expected = apply_head(experts[0].head, z - z.sum(1, keepdim=True).relu())
        torch.testing.assert_close(predict(backbone.eval(), entry, x), expected)


def test_a_task_without_images_is_told(family, gathered, data):
    backbone, _, _ = family
    images = images_of(data)
    with pytest.raises(KeyError, match="No task with images named 'stripes'"):
        calibration_on({"dots": images["dots"]}, gathered, backbone=backbone, split="train")
    nothing = images | {"stripes": Images(images["dots"].x[:0], images["dots"].y[:0])}
    with pytest.raises(ValueError, match="Task 'stripes' must have images for the merge to look"):
        calibration_on(nothing, gathered, backbone=backbone, split="train")


def planted(base: Base, experts: list[Expert], *, scrambled: bool) -> Experts:
    """Return experts, the units of the second in a planted order, as of a base of its own."""
    gathered = Experts(
        base=base.params,
        tuned=[expert.backbone for expert in experts],
        structure=base.structure,
        cards=[expert.card for expert in experts],
        heads=[expert.head for expert in experts],
        names=list(TASKS),
        backbone=base.backbone,
    )
    draw = torch.Generator().manual_seed(0)
    sizes = permutation_sizes(base.params, base.structure)
    order = {key: torch.randperm(size, generator=draw) for key, size in sizes.items()}
    if not scrambled:
        return gathered
    first, second = gathered.cards
    cards = [first, replace(second, base_hash="another")]
    return permuted(replace(gathered, cards=cards), [{}, order])


@pytest.mark.parametrize("method", ["greedy_soup", "fisher", "surgery"])
def test_what_looks_after_a_veneer_has_its_heads_and_statistics(make_family, data, method):
    family = make_family("resnet", image_size=None, length=0.01)
    backbone, base, experts = family.backbone, family.base, family.experts
    images = images_by_split(data, splits_needed(method, "average", base.structure), count=20)
    found, plain = (
        merge_calibrated(
            planted(base, experts, scrambled=scrambled),
            method,
            images,
            backbone=backbone,
            config=FEW.get(method, {}),
            veneers=[("git_rebasin", {})] if scrambled else [],
            batch_norm="average",
        )
        for scrambled in (True, False)
    )
    for task in TASKS:
        right, left = plain.for_task(task), found.for_task(task)
        for name, tensor in right.items():
            torch.testing.assert_close(left[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(found.heads[task], plain.heads[task])
    for task, adapter in plain.adapters.items():
        torch.testing.assert_close(found.adapters[task], adapter, rtol=1e-2, atol=1e-3)


def test_images_without_a_network_to_look_with_are_refused(gathered, data):
    with pytest.raises(ValueError, match="Looking at images needs the experts' `backbone`"):
        merge_calibrated(gathered, "greedy_soup", {"val": images_of(data, "val")}, backbone=None)
    merged = merge_calibrated(gathered, "average", {}, backbone=None)
    assert merged.tasks == TASKS


def test_the_command_finds_the_images_that_a_method_declares(family, tmp_path, tiny_suite, capsys):
    paths = [str(tmp_path / f"{task}.safetensors") for task in TASKS]
    for path, expert in zip(paths, family[2], strict=True):
        save_expert(path, expert)
    out = tmp_path / "m.safetensors"
    words = ["merge", *paths, "--out", str(out), "--method", "greedy_soup"]
    assert main(words) == 2
    assert (
        "'greedy_soup' looks at val images of every task, but got none" in capsys.readouterr().err
    )
    assert not out.exists()
    suite = ["--data.suite", tiny_suite, "--data.reserve", "8"]
    assert main([*words, *suite, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["metrics"]["merged"]
    assert (facts["method"], facts["data"]) == ("greedy_soup", "val")
    assert load_merged(out).facts == facts
    assert main([*words, *suite, "--data.val_share", "0"]) == 2
    assert "must have images for the merge to look at, but has none" in capsys.readouterr().err
