"""A small run folder: three experts, a base and two merges with known numbers."""

import json
import math

import pytest

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Expert
from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record

TASKS = ("digits", "letters", "<b>odd & name</b>")

GEOMETRY = {
    "norms": [1.0, 2.0, 0.0],
    "cosine": [[1.0, 0.1, None], [0.1, 1.0, None], [None, None, None]],
    "sign_conflict": [[0.0, 0.45, None], [0.45, 0.0, None], [None, None, None]],
    "cancellation": 0.25,
}


def measures(accuracy, *, normalised=None, n=100):
    return {
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.05, accuracy + 0.05],
        "normalised_accuracy": normalised,
        "loss": 1.0 - accuracy,
        "calibration_error": 0.1,
        "n": n,
    }


def model(kind, accuracies, **facts):
    tasks = {task: measures(value) for task, value in accuracies.items()}
    mean = sum(accuracies.values()) / len(accuracies)
    return {"kind": kind, "tasks": tasks, "mean": measures(mean, normalised=0.9), **facts}


def make_evaluation(*, merged=(0.6, 0.5, 0.4), warnings=()):
    """A record with a base at .3, a merge, a test-time merge at .95, and experts at .9."""
    models = {
        "base": model("base", dict.fromkeys(TASKS, 0.3)),
        "average": model(
            "merged", dict(zip(TASKS, merged, strict=True)), method="average", data="none"
        ),
        "adapted": model("merged", dict.fromkeys(TASKS, 0.95), data="test-unlabelled"),
        **{f"{task} expert": model("expert", {task: 0.9}) for task in TASKS},
    }
    return Record(
        stage="evaluate",
        name="evaluation",
        config={"split": "test", "data": {"suite": "tiny"}, "note": None},
        seeds={"seed": 3},
        metrics={
            "models": models,
            "warnings": list(warnings),
            "coefficients": {
                "average": {
                    "scale": [0.0, 0.5, 1.0],
                    "normalised_accuracy": [0.3, 0.5, 0.4],
                    "chosen": 0.5,
                }
            },
            "observers": {"DeltaGeometry": {"experts": list(TASKS), "global": GEOMETRY}},
        },
        git_commit="abc123",
        versions={"torch": "2"},
        finished="2026-01-02T00:00:00+00:00",
    )


@pytest.fixture
def evaluation():
    """The function that makes the record of an evaluation."""
    return make_evaluation


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with the evaluation, one training record a task, and its log."""
    folder = tmp_path / "run"
    make_evaluation(warnings=["The experts' deltas differ in length."]).write(
        folder / "evaluation.record.json"
    )
    for index, task in enumerate(TASKS):
        name = f"task{index}"
        card = Card(task=task, steps=50, lr=0.01, travel=4.5, train_loss=0.2)
        save_expert(folder / f"{name}.safetensors", Expert({}, {}, {}, card))
        record = Record(
            stage="train",
            name=task,
            config={},
            outputs=[f"{name}.safetensors"],
            finished="2026-01-01",
        )
        record.write(folder / f"{name}.record.json")
        rows = [
            {"step": k, "train/loss": 2 * math.exp(-k / 20), "gradient/norm": 1 / (k + 1)}
            for k in range(50)
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        write_text(folder / "logs" / name / "metrics.jsonl", text)
    return folder
