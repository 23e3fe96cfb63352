"""What is told of a merge before it is scored: from cards, deltas, images and a probe."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.core.cards import Card
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.search.predicting import cards, data, deltas, probing, sights
from mergekit_lit.search.predicting.columns import checked, joined, spread
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.theory.effort import Effort

EFFORT = Effort(micro_batches=2, batch=4, hessian_images=4, images=8)


def test_spreads_are_of_what_is_known():
    assert spread("x", [1.0, math.nan, 3.0]) == {"x_mean": 2.0, "x_min": 1.0, "x_max": 3.0}
    assert all(map(math.isnan, spread("x", [math.nan]).values()))


def test_rows_hold_each_column_once():
    assert joined([{"a": 1}], [{"b": 2}]) == [{"a": 1, "b": 2}]
    with pytest.raises(ValueError, match="'a' comes twice"):
        joined([{"a": 1}], [{"a": 2}])
    with pytest.raises(ValueError, match="'b' is none of them"):
        checked({"b": 1}, [])


def test_cards_give_the_closed_forms_of_the_bound(tiny_experts):
    experts = replace(
        tiny_experts,
        cards=[replace(card, batch=8, n=40, eps_path=0.1) for card in tiny_experts.cards],
    )
    average, longer = (
        merge(experts, "average"),
        merge(experts, "task_arithmetic", config={"scale": 2.0}),
    )
    rows = cards.of_cards(experts, average)
    assert all(set(row) == {column.name for column in cards.COLUMNS} for row in rows)
    # Travels 1, 2, 3: w = 1/6, 2/6, 3/6.
    w = np.array([1, 2, 3]) / 6
    assert [row["own_w"] for row in rows] == pytest.approx(w)
    assert rows[0]["bound_chi2_w"] == pytest.approx(float(((1 / 3 - w) ** 2 / w).sum()))
    assert rows[0]["bound_chi2_lambda"] == pytest.approx(0, abs=1e-12)
    assert rows[0]["bound_log_delta_path"] == pytest.approx(math.log10(0.1 / 3))
    assert rows[0]["travel_ratio"] == pytest.approx(3)
    assert rows[2]["log_travel_beside"] == pytest.approx(math.log10(3) - math.log10(6) / 3)
    assert rows[1]["own_log_epochs"] == pytest.approx(math.log10(2))
    others = cards.of_cards(experts, longer)
    assert others[0]["coefficient"] == others[0]["scale"] == 2.0
    assert others[0]["bound_a_eff"] == pytest.approx(12)
    assert others[0]["average_a_eff"] == pytest.approx(2)


def test_what_is_unknown_is_nan(tiny_experts):
    experts = replace(tiny_experts, cards=[Card(task=name) for name in tiny_experts.names])
    (row, *_) = cards.of_cards(experts, merge(experts, "ties"))
    assert row["linear"] == 0
    for name in ("own_log_lr", "log_travel_mean", "coefficient", "bound_a_eff", "average_chi2_w"):
        assert math.isnan(row[name])
    assert row["density"] == 0.2


def test_deltas_are_told_of_each_expert_and_step(tiny_experts):
    angles = deltas.angles_of(tiny_experts)
    group = deltas.of_deltas(tiny_experts, angles)
    step = deltas.of_step(tiny_experts, merge(tiny_experts, "average"))
    rows = joined(group, step)
    assert all(set(row) == {column.name for column in deltas.COLUMNS} for row in rows)
    cosine = angles.total.cosine
    assert rows[0]["cosine_max"] == pytest.approx(float(max(cosine[0, 1], cosine[0, 2])))
    norms = angles.total.norms
    # Of the average: (1 + sum of cosines by lengths) / 3.
    along = sum(float(cosine[0, t] * norms[t] / norms[0]) for t in range(3)) / 3
    assert rows[0]["survival"] == pytest.approx(along, rel=1e-5)
    whole = rows[0]["interference"] ** 2 + rows[0]["survival"] ** 2
    assert whole == pytest.approx(rows[0]["step_ratio"] ** 2, rel=1e-9)


def test_images_give_gradients_that_agree_with_one_another(resnets):
    backbone, base = load_base("timm/test_resnet@random:0", image_size=32)
    experts = in_memory(load_experts(resnets.paths, base=base))
    suite = load_suite(resnets.calibration.suite)
    tasks = [
        sights.blind(suite.task(name).load(SplitOptions(reserve=8)), images=10)
        for name in experts.names
    ]
    assert all(len(task.test) == 0 and len(task.val) == 10 for task in tasks)
    scorer = Scorer(backbone, tasks)
    ones = [
        replace(
            experts,
            **{k: getattr(experts, k)[t : t + 1] for k in ("tuned", "cards", "heads", "names")},
        )
        for t in range(2)
    ]
    pairs = list(zip(ones, tasks, strict=True))
    looks = [sights.sight_of(one, backbone, task, scorer, effort=EFFORT) for one, task in pairs]
    alone = [
        sights.look_at_expert(one, backbone, sight, scorer, effort=EFFORT)
        for one, sight in zip(ones, looks, strict=True)
    ]
    average = merge(experts, "average")
    seen = sights.see(experts, average, looks, alone)
    rows = data.of_data(experts, average, seen)
    assert all(set(row) == {column.name for column in data.DATA_COLUMNS} for row in rows)
    for row in rows:
        first_order = (row["gradient_own"] + row["gradient_other_mean"]) / 2
        assert row["gradient_step"] == pytest.approx(first_order, rel=1e-3, abs=1e-6)
    squares = sum(row["gradient2"] for row in rows) / 2
    assert rows[0]["zeta2_mean"] == pytest.approx(squares - rows[0]["group_gradient2"])
    assert rows[0]["bound_merged_noise"] != rows[0]["bound_merged_noise"]
    probe = probing.probe_of(average, backbone, tasks, scorer, effort=EFFORT)
    probed = data.of_probe(experts, seen, probe)
    assert all(set(row) == {column.name for column in data.PROBE_COLUMNS} for row in probed)
    accuracies = [row["probe_val_accuracy"] for row in probed]
    assert probed[0]["probe_val_accuracies_min"] == min(accuracies)
