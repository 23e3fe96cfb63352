"""Tests of mergekit_lit.lit.scores: against torchmetrics, whatever order the images came in."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from mergekit_lit.lit.scores import OutcomeLog, Outcomes, outcomes_of, score_table, summarise
from mergekit_lit.reports.intervals import unpack_flags


def _batch(n=97, classes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=draw)
    return logits, torch.randint(classes, (n,), generator=draw)


def _outcomes(right, confidence=0.5):
    correct = torch.tensor(right)
    return Outcomes(correct, torch.ones(len(right)), torch.full((len(right),), confidence))


def test_the_summary_is_torchmetrics_own():
    logits, labels = _batch()
    found = summarise(outcomes_of(logits, labels))
    accuracy = MulticlassAccuracy(5, average="micro")(logits, labels)
    error = MulticlassCalibrationError(5, n_bins=15, norm="l1")(logits.softmax(1), labels)
    assert found["accuracy"] == pytest.approx(float(accuracy), abs=1e-7)
    assert found["calibration_error"] == pytest.approx(float(error), abs=1e-6)
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-6)
    assert found["confidence"] == pytest.approx(float(logits.softmax(1).amax(1).mean()), rel=1e-6)
    assert found["n"] == 97


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_without_finite_logits_is_wrong_and_leaves_no_loss(bad):
    logits, labels = torch.eye(3), torch.arange(3)
    logits[0] = bad
    found = summarise(outcomes_of(logits, labels))
    assert (found["accuracy"], found["not_finite"], found["n"]) == (2 / 3, 1, 3)
    assert found["loss"] is found["calibration_error"] is found["confidence"] is None
    tasks = {"a": outcomes_of(logits, labels), "b": outcomes_of(torch.eye(3), labels)}
    mean = score_table({"m": tasks})["m"]["mean"]
    assert (mean["loss"], mean["not_finite"]) == (None, 1)
    assert mean["accuracy"] == pytest.approx(5 / 6)


def test_half_precision_logits_are_scored_in_float32():
    logits, labels = _batch()
    half = outcomes_of(logits.bfloat16(), labels)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, outcomes_of(logits.bfloat16().float(), labels).loss)


def test_the_log_puts_images_in_order_whatever_order_they_came_in():
    logits, labels = _batch()
    parts = torch.arange(97).split(10)
    logs = []
    for order in (parts, parts[1::2] + parts[::2]):
        log = OutcomeLog()
        for positions in order:
            for cell in (0, 3):
                shifted = logits[positions] + torch.eye(5)[cell]
                log.update(cell, positions, outcomes_of(shifted, labels[positions]))
        logs.append(log.outcomes())
    assert list(logs[0]) == [0, 3]
    for cell in logs[0]:
        assert summarise(logs[0][cell]) == summarise(logs[1][cell])
        assert torch.equal(logs[0][cell].loss, logs[1][cell].loss)


def test_the_table_by_hand():
    expert = {"a": _outcomes([True, True, False, True]), "b": _outcomes([True, False])}
    model = {"a": _outcomes([True, False, False, False]), "b": _outcomes([True, True])}
    table = score_table({"experts": expert, "merged": model}, experts=expert)
    merged = table["merged"]
    assert merged["tasks"]["a"]["accuracy"] == 0.25
    assert merged["tasks"]["a"]["normalised_accuracy"] == pytest.approx(1 / 3)
    assert merged["mean"]["accuracy"] == 0.625
    assert merged["mean"]["normalised_accuracy"] == pytest.approx((1 / 3 + 2) / 2)
    assert merged["mean"]["n"] == 6
    low, high = merged["mean"]["accuracy_interval"]
    assert low < 0.625 < high
    assert unpack_flags(merged["tasks"]["a"]["correct"], 4).tolist() == [True, False, False, False]
    experts = table["experts"]["mean"]
    assert experts["normalised_accuracy"] == 1.0
    # Of 4 images some resample holds none that the expert has right: no interval.
    assert table["experts"]["tasks"]["a"]["normalised_accuracy_interval"] is None


@pytest.mark.parametrize("expert", [{}, {"a": _outcomes([False, False])}])
def test_without_a_right_expert_there_is_no_normalised_accuracy(expert):
    model = {"a": _outcomes([True, False]), "b": _outcomes([True, True])}
    table = score_table({"m": model}, experts={**expert, "b": _outcomes([True, True])})["m"]
    assert table["tasks"]["a"]["normalised_accuracy"] is None
    assert table["tasks"]["b"]["normalised_accuracy"] == 1.0
    assert table["mean"]["normalised_accuracy"] is None
