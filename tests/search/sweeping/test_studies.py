"""Optuna: batches that learn from those before, alike after a kill, and refusals."""

from statistics import fmean

import pytest

from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.studies import Study, Trials, check_study
from mergekit_lit.search.sweeping.sweep import run_sweep

AXES = {"a": {"optuna": {"low": 0.0, "high": 10.0}}, "b": [0, 1]}


def swept(job, out, **settings):
    study = Study(metric="sum", **{"trials": 12, "batch": 3, **settings})
    return run_sweep(read_axes(AXES), job, out=out, study=study, quiet=True).record.metrics


def test_a_trial_is_one_choice_at_every_point_of_the_other_axes(sums, tmp_path):
    job = sums()
    metrics = swept(job, tmp_path / "out", trials=30, batch=5)
    assert metrics["runs"] == 60
    assert len(metrics["trials"]) == 30
    for trial in metrics["trials"]:
        assert trial["value"] == pytest.approx(trial["point"]["a"] + 0.5)
    assert metrics["best"]["value"] == max(trial["value"] for trial in metrics["trials"])
    # Of 10 trials Optuna draws at random; later batches know of earlier ones.
    values = [trial["value"] for trial in metrics["trials"]]
    assert fmean(values[20:]) > fmean(values[:10]) + 1


def test_a_killed_study_goes_on_alike(sums, tmp_path):
    whole = swept(sums(), tmp_path / "whole")
    swept(sums(), tmp_path / "out", trials=6)
    job = sums()
    assert swept(job, tmp_path / "out") == whole
    assert len(job.begun) == 12


def test_losses_are_made_small_and_failures_have_no_value(sums, tmp_path):
    assert Study(metric="val_loss").direction == "minimize"
    job = sums(errors={1: [ValueError("no")]})
    metrics = swept(job, tmp_path / "out", trials=2, batch=2)
    assert [trial["value"] is None for trial in metrics["trials"]].count(True) == 1
    assert len(metrics["failed"]) == 1


@pytest.mark.parametrize(
    ("axes", "study", "message"),
    [
        (AXES, None, "`a` asks for Optuna, so `optuna` must say"),
        ({"b": [1]}, {"metric": "sum"}, "must come with one mapping of axes"),
        ([AXES, {"b": [3]}], {"metric": "sum"}, "must come with one mapping of axes"),
        (AXES, {"metric": "summ"}, "Did you mean 'sum'?"),
        ({"steps": {"optuna": [1, 2]}}, {"metric": "sum"}, "`steps` must be a grid"),
        (AXES, {"metric": "sum", "trials": 0}, "`optuna.trials` must be a whole number"),
        (AXES, {"metric": "sum", "batch": "x"}, "`optuna.batch` must be a whole number"),
    ],
)
def test_studies_that_do_not_fit_are_refused(sums, axes, study, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        check_study(study and Study(**study), read_axes(axes), sums())
    assert message in str(caught.value)


def test_choices_are_asked_for_too(sums):
    axes = read_axes({"b": {"optuna": [3, 4]}, "a": {"optuna": {"low": 1, "high": 2}}})
    trials = Trials(Study(metric="sum", trials=4), axes[0], sums())
    assert trials.ask(None)
    assert {point["b"] for point in trials.points} <= {3, 4}
    assert {type(point["a"]) for point in trials.points} == {int}
