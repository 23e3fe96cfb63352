"""What W&B keeps of the way from base to merge, and TensorBoard of a training."""

import json
import re

import pytest

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.stages.evaluate import evaluate_files
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.train import train_expert

BASE = "vit@random:0"


@pytest.fixture
def train(tiny_suite, tmp_path):
    def run(task="dots", *, name=None, resume=False, **model):
        model = {"base": BASE, "image_size": 8, **model}
        return train_expert(
            data=TaskDataModule(suite=tiny_suite, task=task, reserve=4),
            model=ExpertModule(**model),
            steps=[4],
            out=tmp_path / "runs",
            loggers="wandb",
            name=name,
            resume=resume,
            trainer={"accelerator": "cpu", "devices": 1, "log_every_n_steps": 2},
        )

    return run


@pytest.mark.slow
def test_lineage_leads_from_the_base_to_the_evaluation(train, tiny_suite, tmp_path, offline_runs):
    expert = train().experts[0]
    merged = merge_files([expert], out=tmp_path / "runs" / "m.safetensors", logger="wandb").path
    data = MergeDataModule(tiny_suite, reserve=4)
    evaluate_files([merged], data=data, out=tmp_path / "runs", logger="wandb")
    trained, made, scored = offline_runs(tmp_path)
    assert [kept.used() for kept in (trained, made, scored)] == [
        ["base-vit-random-0"],
        ["base-vit-random-0", "expert-dots"],
        ["merged-m"],
    ]
    assert [kept.made() for kept in (trained, made, scored)] == [["expert-dots"], ["merged-m"], []]
    # One version of one artifact: who uses it means what the other made.
    for name, maker, user in (
        ("base-vit-random-0", trained, made),
        ("expert-dots", trained, made),
        ("merged-m", made, scored),
    ):
        assert maker.artifact(name)["digest"] == user.artifact(name)["digest"]
    sources = json.loads(made.artifact("merged-m")["metadata"])["made_from"]
    content = json.loads(trained.artifact("expert-dots")["metadata"])["content"]
    assert sources["expert-dots"] == content


@pytest.mark.slow
def test_the_card_is_the_configuration_and_the_history_has_the_steps(train, tmp_path, offline_runs):
    card = load_expert(train(lr=0.01, seed=7).experts[0]).card.to_json()
    (kept,) = offline_runs(tmp_path)
    told = {key: value for key, value in kept.config.items() if key in card}
    assert told == pytest.approx({key: card[key] for key in told})
    assert card.keys() - told.keys() == {key for key in card if card[key] is None} - told.keys()
    assert kept.config["model"]["lr"] == kept.config["lr"] == 0.01
    assert kept.summary["val_loss"] == pytest.approx(card["val_loss"])
    assert [row["_step"] for row in kept.history if "train/loss" in row] == [1, 3]
    assert kept.run["tags"][1:] == [BASE, "train"]
    assert kept.run["run_group"] == "runs"


@pytest.mark.slow
def test_divergence_is_an_alert_and_the_next_run_has_its_own_history(train, tmp_path, offline_runs):
    with pytest.raises(ValueError, match="must be finite"):
        train(name="bad", lr=1e30, warmup_steps=0)
    train()
    bad, good = offline_runs(tmp_path)
    (alert,) = bad.alerts
    assert alert["level"] == "ERROR"
    assert re.search(r"must be finite, but is nan at step \d of task 'dots'", alert["text"])
    assert (bad.exit_code, good.exit_code) == (1, 0)
    assert bad.made() == []
    assert good.alerts == []
