"""What the runs of a sweep over trainings are: which are one, and what each is told."""

import pickle
import time
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lit.cli import sweep
from mergekit_lit.cli.dotted import nested
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.cli.train_job import TrainJob
from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.plan import plan_runs


def test_the_path_and_not_its_length_names_a_training(tiny_suite):
    data = {"suite": tiny_suite, "task": "dots"}
    job = TrainJob({"data": data, "model": {"schedule": "constant"}, "steps": 100})

    def name(**point):
        config = job.complete({key.replace("_", ".", 1): value for key, value in point.items()})
        return repr(sorted(job.identity(config)[0].items()))

    assert name(steps=100) == name(steps=400)
    # A warm-up of at most half the steps is another path.
    assert name(steps=30) != name(steps=100)
    assert name(model_schedule="cosine", steps=100) != name(model_schedule="cosine", steps=400)
    assert name(model_seed=1) != name()


def test_seed_is_short_for_that_of_the_model(tiny_suite):
    job = TrainJob({"data": {"suite": tiny_suite, "task": "all"}, "steps": 2})
    one, other = (plan_runs(read_axes({key: [3, 4]}), job) for key in ("seed", "model.seed"))
    assert len(one.runs) == 4
    assert [run.name for run in one.runs] == [run.name for run in other.runs]


def test_interpolations_follow_the_axes(tiny_suite):
    data = {"suite": tiny_suite, "task": "dots", "split_seed": 7}
    job = TrainJob({"data": data, "model": {"seed": "${data.split_seed}"}, "steps": 2})
    plan = plan_runs(read_axes({"data.split_seed": [1, 2], "model.lr": [0.1, 0.2, 0.3]}), job)
    found = [plan.config(run) for run in plan.runs]
    assert [config["model.seed"] for config in found] == [1, 1, 1, 2, 2, 2]
    assert len(plan.bases) == 1
    assert plan.keys == ("data.split_seed", "model.lr")


def test_interpolated_values_are_parsed_once_not_once_a_run(tiny_suite, monkeypatch):
    """A parser takes half a second for each."""
    parsed, complete = [], TrainJob.complete
    monkeypatch.setattr(TrainJob, "complete", lambda *of: parsed.append(of[1]) or complete(*of))
    given = {
        "data": {"suite": tiny_suite, "task": "dots", "split_seed": "${model.seed}"},
        "model": {"lr": "${model.weight_decay}"},
        "checkpoint_every": "${model.seed}",
        "steps": 2,
    }
    decays = [round(0.001 * place, 3) for place in range(1, 6)]
    axes = {"model.seed": list(range(30)), "model.weight_decay": decays}
    plan = plan_runs(read_axes(axes), TrainJob(given))
    found = [plan.config(run) for run in plan.runs]
    assert len(found) == 150
    assert len(parsed) < 10
    assert all(config["data.split_seed"] == config["model.seed"] for config in found)
    assert all(config["model.lr"] == config["model.weight_decay"] for config in found)
    one = TrainJob(given).complete({"model.seed": 7, "model.weight_decay": 0.003})
    (same,) = [each for each in found if (each["model.seed"], each["model.lr"]) == (7, 0.003)]
    assert {**same, "checkpoint_every": 7} == one


def test_ten_thousand_runs_are_planned_in_little_time_and_memory(tiny_suite):
    job = TrainJob({"data": {"suite": tiny_suite, "task": "all"}, "steps": 100})
    draws = {"random": {"low": 1e-4, "high": 0.1, "log": True, "samples": 50}}
    axes = {"model.lr": draws, "model.seed": list(range(100))}
    begun = time.process_time()
    plan = plan_runs(read_axes(axes), job)
    assert len({run.name for run in plan.runs}) == 10_000
    assert time.process_time() - begun < 5
    assert len(pickle.dumps(plan)) < 2 * 10**6


def test_the_example_is_the_grid_that_is_timed():
    path = Path(__file__).parents[2] / "experiments" / "sweep_resnet_embedded8.yaml"
    values = yaml.safe_load(path.read_text())
    axes = read_axes(values.pop("axes"))
    ours = ("job", "out", "retries", "launcher")
    plan = plan_runs(axes, TrainJob({key: values[key] for key in values if key not in ours}))
    assert (len(plan.runs), plan.results, plan.shared) == (54, 216, 54)


def test_lockstep_must_be_asked_for():
    """Which way is faster depends on the machine, and the two differ by rounding."""
    assert signature(sweep.options).parameters["lockstep"].default == "never"


@pytest.mark.parametrize(
    ("more", "tried"),
    [
        ({"data.batch": 8}, True),
        ({"data.batch": 32}, False),
        ({"data.batch": 8, "model.finetuning": "lora"}, False),
        ({"data.batch": 8, "trainer.precision": "bf16-mixed"}, False),
        ({"data.batch": 8, "trainer.gradient_clip_val": 1.0}, True),
        ({"data.batch": 8, "logger": "wandb"}, False),
    ],
)
def test_lockstep_is_tried_where_it_may_pay(more, tried, tiny_suite, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"data": {"suite": tiny_suite, "task": "dots"}, "steps": 2}
    job = TrainJob(merged_values(given, nested(more)))
    points = ({"model.lr": 0.1, "data.n": 9}, {"model.lr": 0.2, "model.seed": 3})
    one, other = (job.alike(job.complete(point)) for point in points)
    assert bool(one.execute and one.may_pay) == tried
    assert one.kind == other.kind
    assert one.kind != job.alike(job.complete({"model.label_smoothing": 0.1})).kind or not tried
