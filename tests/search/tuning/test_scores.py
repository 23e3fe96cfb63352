"""One module stands in for every model in turn, and keeps nothing of the one before."""

from dataclasses import replace

import pytest
import torch

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import recalibrate
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.gather import load_experts
from mergekit_lit.search.tuning.scores import Scorer, expert_rows
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.opening import load_base_of


@pytest.fixture(scope="module")
def loaded(resnets):
    """Backbone, experts and tasks of the tiny ResNets."""
    backbone, base = load_base_of(resnets.paths)
    suite = load_suite(resnets.calibration.suite)
    tasks = [suite.task(path.stem).load(resnets.calibration.options) for path in resnets.paths]
    return backbone, load_experts(resnets.paths, base=base), tasks


def candidates(loaded):
    """Models that differ in all tensors, by task in statistics, by task in masks, by adapters."""
    backbone, experts, tasks = loaded
    images = {task.name: task.train.subset(torch.arange(12).numpy()) for task in tasks}
    plain = merge(experts, "task_arithmetic")
    adapter = {"down": torch.ones(2, backbone.features), "up": torch.ones(backbone.features, 2)}
    return {
        "plain": plain,
        "statistics": recalibrate(plain, images, backbone=backbone, per_task=True),
        "masks": merge(experts, "tall_masks"),
        "adapters": replace(plain, adapters={"dots": adapter}),
        "plain again": plain,
    }


def test_outcomes_are_those_of_each_model_alone(loaded):
    backbone, _, tasks = loaded
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    scorer = Scorer(backbone, tasks)
    models = candidates(loaded)
    table = evaluate_models(backbone, models, tasks, split="val")
    losses = set()
    for name, merged in models.items():
        for task, outcomes in scorer.outcomes(merged).items():
            row = table[name]["tasks"][task]
            assert outcomes.accuracy == row["accuracy"]
            assert float(outcomes.loss.double().mean()) == pytest.approx(row["loss"], rel=1e-6)
        losses.add(float(outcomes.loss.sum()))
    assert len(losses) >= 3
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())


def test_a_subset_is_scored_like_the_whole(loaded):
    backbone, experts, tasks = loaded
    scorer = Scorer(backbone, tasks)
    merged = merge(experts, "average")
    whole = scorer.outcomes(merged)["dots"]
    places = torch.tensor([1, 5, 30])
    part = scorer.outcomes(merged, {"dots": places, "stripes": torch.arange(0)})
    torch.testing.assert_close(part["dots"].loss, whole.loss[places])
    assert len(part["stripes"]) == 0


def test_experts_are_scored_each_on_its_own_task(loaded, resnets):
    backbone, _, tasks = loaded
    rows = expert_rows(backbone, [load_expert(path) for path in resnets.paths], tasks)
    assert list(rows) == [task.name for task in tasks]
    assert all(row["n"] == len(task.val) for row, task in zip(rows.values(), tasks, strict=True))
