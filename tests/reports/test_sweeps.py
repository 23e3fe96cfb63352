"""What a sweep comes to: numbers by hand."""

import statistics

import pytest

from mergekit_lit.reports.index import Entry
from mergekit_lit.reports.sweeps import (
    by_method_and_task,
    configurations,
    effect,
    factors,
    marginal,
    objective_of,
    scored,
    sweep_rows,
)


def trained(lr, seed, task, value, *, decay=0.0):
    settings = {
        "model.lr": lr,
        "model.seed": seed,
        "model.decay": decay,
        "data.task": task,
        "data.split_hash": f"{task}",
        "steps": "[5]",
    }
    path = f"runs/{lr}-{seed}-{task}-{decay}/a.record.json"
    result = {"task": task, "steps": 5, "val_accuracy": value, "val_loss": 1 - value}
    return Entry(path, "train", task, "", settings, (result,))


@pytest.fixture
def rows():
    """Two rates, two seeds and two tasks; 0.1 is better, by 0.2."""
    return sweep_rows(
        trained(lr, seed, task, 0.5 + 2 * lr + 0.01 * seed + 0.1 * (task == "easy"))
        for lr in (0.0, 0.1)
        for seed in (0, 1)
        for task in ("easy", "hard")
    )


def test_a_result_tells_its_task_and_steps_itself(rows):
    assert rows[0]["task"] == "easy"
    assert rows[0]["steps"] == 5
    assert "data.task" not in rows[0]


def test_factors_are_what_varies(rows):
    assert set(factors(rows)) == {"model.lr", "model.seed", "task"}


def test_a_marginal_is_the_mean_over_all_else(rows):
    levels = marginal(rows, "model.lr", "val_accuracy")
    assert [level.label for level in levels] == ["0", "0.1"]
    assert [level.mean for level in levels] == pytest.approx([0.555, 0.755])
    assert [level.count for level in levels] == [4, 4]
    assert effect(levels) == pytest.approx(0.2)
    # Of 0.50, 0.51, 0.60, 0.61 the 10th percentile lies 0.3 of the way between the first two.
    assert levels[0].low == pytest.approx(0.503)
    assert levels[0].high == pytest.approx(0.607)
    words = marginal(rows, "task", "val_accuracy")
    assert [level.label for level in words] == ["easy", "hard"]
    assert [level.label for level in marginal(rows, "task", "val_loss")] == ["easy", "hard"]


def test_many_numbers_are_shown_as_ranges_of_all_of_them():
    rows = [{"lr": index / 7, "val_accuracy": index / 100} for index in range(100)]
    levels = marginal(rows, "lr", "val_accuracy")
    assert len(levels) == 8
    assert sum(level.count for level in levels) == 100
    assert levels[0].label == "0 to 1.71"
    assert [level.mean for level in levels] == sorted(level.mean for level in levels)


def test_the_best_configuration_is_a_mean_over_tasks_and_seeds(rows):
    found = configurations(rows, "val_accuracy", varied=factors(rows), most=5)
    assert [each.values for each in found] == [{"model.lr": 0.1}, {"model.lr": 0.0}]
    assert found[0].mean == pytest.approx(0.755)
    # Two seeds: t of one degree of freedom, over the means of their tasks.
    half = 12.7062 * statistics.stdev([0.75, 0.76]) / 2**0.5
    assert found[0].interval == pytest.approx((0.755 - half, 0.755 + half), abs=1e-5)
    losses = configurations(rows, "val_loss", varied=factors(rows), most=1)
    assert [each.values for each in losses] == [{"model.lr": 0.1}]


def test_a_configuration_that_lacks_results_comes_after_those_that_do_not(rows):
    lucky = sweep_rows([trained(0.9, 0, "easy", 1.0)])
    found = configurations([*lucky, *rows], "val_accuracy", varied=factors(rows), most=5)
    assert [each.values["model.lr"] for each in found] == [0.1, 0.0, 0.9]
    assert found[-1].interval is None


def merge_entries(number, method, scores):
    results = tuple(
        {"model": "merged", "task": task, "accuracy": value, "method": method, "n": 50}
        for task, value in scores.items()
    )
    folder = f"runs/{number}"
    settings = {"models": f'["{folder}"]', "split": "val", "batch_norm": "stored"}
    recipe = {"method": method, "scale": number / 10, "batch_norm": "base"}
    return [
        Entry(f"{folder}/merged.record.json", "merge", "merged", "", recipe, ()),
        Entry(f"{folder}/scores-val.record.json", "evaluate", "scores", "", settings, results),
    ]


@pytest.fixture
def merges():
    """Three merges of two methods on two tasks."""
    scores = [("ties", 0.2, 0.4), ("ties", 0.4, 0.6), ("average", 0.9, 0.1)]
    return sweep_rows(
        entry
        for number, (method, a, b) in enumerate(scores)
        for entry in merge_entries(number, method, {"a": a, "b": b, "(mean)": (a + b) / 2})
    )


def test_scores_have_the_settings_of_the_merge_beside_them(merges):
    assert merges[0]["scale"] == 0.0
    assert merges[0]["batch_norm"] == "base"
    assert "models" not in merges[0]
    assert set(factors(scored(merges, "accuracy"))) == {"scale", "method"}


def test_means_count_once_unless_tasks_are_asked_for(merges):
    assert [row["accuracy"] for row in scored(merges, "accuracy")] == pytest.approx([0.3, 0.5, 0.5])
    tasks = [row for row in merges if row["task"] != "(mean)"]
    assert len(scored(tasks, "accuracy")) == 6


def test_methods_by_task_are_means_from_the_best_down(merges):
    methods, tasks, values = by_method_and_task(merges, "accuracy")
    assert methods == ["average", "ties"]
    assert tasks == ["a", "b"]
    assert values == [pytest.approx([0.9, 0.1]), pytest.approx([0.3, 0.5])]


def test_what_has_seen_test_images_is_never_ranked_with_the_rest(merges):
    seen = [{**row, "method": "ada", "role": "adapted", "accuracy": 1.0} for row in merges[:3]]
    plain = [{**row, "role": "merged"} for row in merges]
    methods, _, _ = by_method_and_task([*seen, *plain], "accuracy")
    assert methods == ["average", "ties", "ada (test)"]
    rows = scored([*seen, *plain], "accuracy")
    found = configurations(rows, "accuracy", varied=factors(rows), most=9)
    assert [each.values["role"] for each in found] == ["merged"] * 3 + ["adapted"]


def test_the_objective_is_the_usual_one_or_a_known_one(rows, merges):
    assert objective_of(rows, None) == "val_accuracy"
    assert objective_of(merges, None) == "accuracy"
    assert objective_of(rows, "val_loss") == "val_loss"
    with pytest.raises(KeyError, match="Did you mean 'val_loss'"):
        objective_of(rows, "val_los")
    with pytest.raises(ValueError, match="needs results"):
        objective_of([], None)
