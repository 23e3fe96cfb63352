"""This file turns logits into scores: per image, exact over processes, then a table with intervals.

Each image is scored once, by itself. Whatever process saw it, the scores are put in the order of
the images before anything is summed, so the numbers do not depend on the number of processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from mergekit_lit.reports.intervals import (
    Draws,
    accuracy_draws,
    mean_draws,
    normalised_draws,
    pack_flags,
    percentile_interval,
)

CALIBRATION_BINS = 15
NAN = float("nan")
_FINITE_ONLY = ("loss", "calibration_error", "confidence")


@dataclass(frozen=True)
class Outcomes:
    """What one model did on each of N images of one task, in the order of the images.

    Attributes:
        correct: whether the largest logit is the label's and all logits are finite, (N,).
        loss: cross-entropy in nats; NaN where a logit is not finite, (N,).
        confidence: largest probability, in [0, 1]; NaN where a logit is not finite, (N,).
    """

    correct: Tensor
    loss: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of images that are right."""
        return int(self.correct.sum()) / len(self)


OutcomeTable = Mapping[str, Mapping[str, Outcomes]]
"""Outcomes by model, then by task."""


def outcomes_of(logits: Tensor, labels: Tensor) -> Outcomes:
    """Return the outcomes of a batch from its logits (B, C) and labels (B,)."""
    # Among NaN the first class is the largest: an image would be right by accident.
    finite = logits.isfinite().all(dim=1)
    log_probabilities = functional.log_softmax(logits.float(), dim=1)
    best, predicted = log_probabilities.max(dim=1)
    return Outcomes(
        correct=(predicted == labels) & finite,
        loss=functional.nll_loss(log_probabilities, labels, reduction="none").where(finite, NAN),
        confidence=best.exp().clamp(max=1.0).where(finite, NAN),
    )


def no_outcomes(device: torch.device) -> Outcomes:
    """Return the outcomes of no image."""
    nothing = torch.zeros(0, device=device)
    return Outcomes(correct=nothing.bool(), loss=nothing, confidence=nothing)


class OutcomeLog(Metric):
    """Outcomes of many cells, one cell a model and task, gathered from all processes."""

    full_state_update = False
    cell: list[Tensor]
    position: list[Tensor]
    correct: list[Tensor]
    loss: list[Tensor]
    confidence: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("cell", "position", "correct", "loss", "confidence"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, cell: int, position: Tensor, outcomes: Outcomes) -> None:
        """Add a batch of one cell: positions of the images (B,) and their outcomes."""
        self.cell.append(torch.full_like(position, cell))
        self.position.append(position)
        self.correct.append(outcomes.correct)
        self.loss.append(outcomes.loss)
        self.confidence.append(outcomes.confidence)

    def compute(self) -> tuple[Tensor, ...]:
        """Return cell, position, correct, loss and confidence of every image of all processes."""
        states = (self.cell, self.position, self.correct, self.loss, self.confidence)
        return tuple(dim_zero_cat(state).cpu() for state in states)

    def outcomes(self) -> dict[int, Outcomes]:
        """Return the outcomes of each cell, in the order of the images, on the CPU."""
        # `compute` hands out a single image without its axis.
        cell, position, *scores = (state.reshape(-1) for state in self.compute())
        found = {}
        for index in sorted(set(cell.tolist())):
            rows = torch.nonzero(cell == index).flatten()
            rows = rows[position[rows].argsort()]
            found[index] = Outcomes(*(score[rows] for score in scores))
        return found


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Return accuracy, mean cross-entropy, calibration error and mean confidence of one task.

    Sums are exactly rounded, so they do not depend on an order either. The calibration error is the
    expected gap between confidence and accuracy over 15 equal bins: of a confidence and whether it
    came true, torchmetrics' binary error is the top-label error of the classes.

    An image of which a logit is not finite counts as wrong and in `not_finite`; a single one leaves
    loss, calibration error and confidence None, for a mean of the others would flatter the model.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    n = len(outcomes)
    lost = n - int(outcomes.confidence.isfinite().sum())
    counts = {"accuracy": outcomes.accuracy, "not_finite": lost, "n": n}
    if lost:
        return counts | dict.fromkeys(_FINITE_ONLY)
    confidence = outcomes.confidence.double()
    error = binary_calibration_error(confidence, outcomes.correct.long(), n_bins=CALIBRATION_BINS)
    return counts | {
        "loss": math.fsum(outcomes.loss.tolist()) / n,
        "calibration_error": float(error),
        "confidence": math.fsum(confidence.tolist()) / n,
    }


def score_table(
    outcomes: OutcomeTable, *, experts: Mapping[str, Outcomes] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return each model's scores by task and their mean, with 95 % bootstrap intervals.

    Normalised accuracy is accuracy over the accuracy of the task's own expert, on the same images;
    its mean is the mean of the ratios. It is None where a task has no expert, or one without a
    single right image.

    Args:
        outcomes: outcomes by model, then by task.
        experts: outcomes of each task's own expert.
        seed: seed of the resampling.

    Returns:
        `{model: {"tasks": {task: row}, "mean": row}}`. A row holds accuracy, normalised_accuracy,
        their `_interval`s, loss, calibration_error, confidence, n, not_finite and, for tasks,
        `correct`: one bit an image (`reports.intervals.unpack_flags`).
    """
    return {
        name: _model_table(by_task, experts or {}, seed=seed) for name, by_task in outcomes.items()
    }


def _model_table(
    by_task: Mapping[str, Outcomes], experts: Mapping[str, Outcomes], *, seed: int
) -> dict[str, Any]:
    rows, plain, normalised = {}, [], []
    for task, outcomes in by_task.items():
        expert = experts.get(task)
        correct = outcomes.correct.numpy()
        plain.append(accuracy_draws(correct, seed=seed, task=task))
        row = summarise(outcomes) | {"accuracy_interval": percentile_interval(plain[-1])}
        row |= {"normalised_accuracy": None, "normalised_accuracy_interval": None}
        if expert is not None and expert.accuracy > 0:
            ratios = normalised_draws(correct, expert.correct.numpy(), seed=seed, task=task)
            row["normalised_accuracy"] = outcomes.accuracy / expert.accuracy
            row["normalised_accuracy_interval"] = percentile_interval(ratios)
            normalised.append(ratios)
        rows[task] = row | {"correct": pack_flags(correct)}
    return {"tasks": rows, "mean": _mean_row(rows, plain, normalised)}


def _mean_row(
    rows: Mapping[str, Mapping[str, Any]], plain: list[Draws], normalised: list[Draws]
) -> dict[str, Any]:
    """Return the unweighted mean over tasks, of each measure that every task has."""
    mean: dict[str, Any] = dict.fromkeys(_FINITE_ONLY)
    for name in ("accuracy", *_FINITE_ONLY):
        values = [row[name] for row in rows.values()]
        if None not in values:
            mean[name] = math.fsum(values) / len(rows)
    mean |= {"accuracy_interval": percentile_interval(mean_draws(plain))}
    mean |= {"normalised_accuracy": None, "normalised_accuracy_interval": None}
    if len(normalised) == len(rows):
        ratios = [row["normalised_accuracy"] for row in rows.values()]
        mean["normalised_accuracy"] = math.fsum(ratios) / len(rows)
        mean["normalised_accuracy_interval"] = percentile_interval(mean_draws(normalised))
    return mean | {key: sum(row[key] for row in rows.values()) for key in ("n", "not_finite")}
