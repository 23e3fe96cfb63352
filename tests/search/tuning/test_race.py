"""What is maximised, and early discard: against formulas, over many draws, and in clear cases."""

import math

import numpy as np
import pytest
import torch

from mergekit_lit.search.tuning.objective import Objective, objective_of
from mergekit_lit.search.tuning.race import Run, estimate, race, stages_of

LABELS = {"a": np.arange(400) % 4, "b": np.arange(160) % 2}
MEAN = Objective("mean", "accuracy", {"a": 1.0, "b": 1.0})


def answers_of(stages, right, draw):
    """A model's answers by stage: right with a probability, whatever the image."""
    return [
        {task: (torch.rand(len(p), generator=draw) < right).float() for task, p in stage.items()}
        for stage in stages
    ]


def raced(stages, answers, rival, objective=MEAN, confidence=0.99):
    def answer(stage):
        return answers[[s is stage for s in stages].index(True)]

    return race(answer, stages, objective, rival=rival, confidence=confidence)


def whole(answers):
    return {task: torch.cat([part[task] for part in answers]) for task in answers[0]}


def known(answers, objective=MEAN):
    values = objective.by_task(whole(answers))
    return Run(whole(answers), values, objective.total(values))


def test_objectives_against_numpy():
    rows = {"a": {"accuracy": 0.8}, "b": {"accuracy": 0.5}}
    answers = {"a": torch.tensor([1.0, 0.0, 1.0, 1.0]), "b": torch.tensor([1.0, 0.0])}
    plain = objective_of(rows, metric="accuracy")
    assert plain.total(plain.by_task(answers)) == np.mean([0.75, 0.5])
    ratio = objective_of(rows, metric="normalised_accuracy")
    assert ratio.by_task(answers) == {"a": 0.75 / 0.8, "b": 1.0}
    assert objective_of(rows, goal="worst", metric="accuracy").total({"a": 0.7, "b": 0.2}) == 0.2
    weighted = objective_of(rows, goal="weighted", weights={"b": 3.0}, metric="accuracy")
    assert weighted.total({"a": 1.0, "b": 0.0}) == np.average([1.0, 0.0], weights=[1, 3])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"goal": "men"}, KeyError, "No objective named 'men'. Did you mean 'mean'"),
        ({"metric": "acuracy"}, KeyError, "Did you mean 'accuracy'"),
        ({"goal": "weighted"}, ValueError, "`weights` belong to the objective 'weighted'"),
        ({"weights": {"a": 1.0}}, ValueError, "`weights` belong to the objective 'weighted'"),
        ({"goal": "weighted", "weights": {"c": 1.0}}, KeyError, "No task to weigh named 'c'"),
        ({"goal": "weighted", "weights": {"a": -1.0}}, ValueError, "must be at least 0"),
        ({"goal": "weighted", "weights": {"a": math.nan}}, ValueError, "must be at least 0"),
        ({"goal": "weighted", "weights": {"a": 0.0, "b": 0.0}}, ValueError, "all are 0"),
        ({"metric": "normalised_accuracy"}, ValueError, "that of 'b' has none"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(options, error, message):
    rows = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.0}}
    with pytest.raises(error, match=message):
        objective_of(rows, **{"metric": "accuracy", **options})


def test_stages_hold_every_image_once_in_growing_shares_with_all_classes():
    stages = stages_of(LABELS, seed=3, discard=True)
    sizes = np.cumsum([[len(stage[task]) for task in LABELS] for stage in stages], axis=0)
    assert sizes.tolist() == [[50, 20], [100, 40], [200, 80], [400, 160]]
    for task, labels in LABELS.items():
        seen = torch.cat([stage[task] for stage in stages])
        assert sorted(seen.tolist()) == list(range(len(labels)))
        first = labels[stages[0][task].numpy()]
        assert np.ptp(np.bincount(first)) <= 1
    again = stages_of(LABELS, seed=3, discard=True)
    assert all(torch.equal(x["a"], y["a"]) for x, y in zip(stages, again, strict=True))
    other = stages_of(LABELS, seed=4, discard=True)
    assert not torch.equal(stages[0]["a"], other[0]["a"])
    (only,) = stages_of(LABELS, seed=3, discard=False)
    assert only["b"].tolist() == list(range(160))


def test_few_images_are_all_seen_at_once():
    stages = stages_of({"a": np.arange(10) % 2}, seed=0, discard=True)
    assert [len(stage["a"]) for stage in stages] == [10, 0, 0, 0]


def test_the_estimate_is_the_paired_difference_of_the_formula():
    draw = torch.Generator().manual_seed(0)
    objective = Objective("mean", "accuracy", {"a": 0.8})
    rival = (torch.rand(400, generator=draw) < 0.7).float()
    mine = (torch.rand(100, generator=draw) < 0.6).float()
    values, errors = estimate({"a": mine}, {"a": rival}, objective)
    d = (mine - rival[:100]).double().numpy()
    assert values["a"] == pytest.approx((rival.double().mean().item() + d.mean()) / 0.8)
    expected = math.sqrt(d.var(ddof=1) / 100 * (1 - 100 / 400)) / 0.8
    assert errors["a"] == pytest.approx(expected)


@pytest.mark.parametrize("goal", ["mean", "worst", "weighted"])
def test_a_candidate_as_good_as_the_rival_is_rarely_discarded(goal):
    """At a level of 0.95 and three looks less than 15 % of winners are lost by chance."""
    weights = {"a": 1.0, "b": 2.0} if goal == "weighted" else {}
    objective = Objective(goal, "accuracy", {"a": 1.0, "b": 1.0}, weights)
    lost = 0
    draw = torch.Generator().manual_seed(1)
    for seed in range(100):
        stages = stages_of(LABELS, seed=seed, discard=True)
        rival, mine = (known(answers_of(stages, 0.7, draw), objective) for _ in range(2))
        if mine.total < rival.total:
            rival, mine = mine, rival
        parts = [
            {
                task: each.split([len(s[task]) for s in stages])[k]
                for task, each in mine.answers.items()
            }
            for k in range(4)
        ]
        lost += raced(stages, parts, rival, objective, confidence=0.95).upper is not None
    assert lost <= 0.15 * 100


def test_clear_losers_are_out_at_once_and_the_best_is_never_discarded():
    stages = stages_of(LABELS, seed=0, discard=True)
    draw = torch.Generator().manual_seed(2)
    qualities = [0.1, 0.2, 0.9, 0.3, 0.15, 0.25]
    rival, runs = None, []
    for right in qualities:
        run = raced(stages, answers_of(stages, right, draw), rival)
        runs.append(run)
        rival = run if run.upper is None and (rival is None or run.total > rival.total) else rival
    assert rival is runs[2]
    assert [run.images for run in runs[3:]] == [70, 70, 70]
    assert all(run.upper < rival.total for run in runs[3:])


def test_the_worst_task_alone_can_put_a_candidate_out():
    worst = Objective("worst", "accuracy", {"a": 1.0, "b": 1.0})
    stages = stages_of(LABELS, seed=0, discard=True)
    draw = torch.Generator().manual_seed(3)
    rival = known(answers_of(stages, 0.7, draw), worst)
    good, poor = answers_of(stages, 0.95, draw), answers_of(stages, 0.4, draw)
    uneven = [{"a": a["a"], "b": b["b"]} for a, b in zip(good, poor, strict=True)]
    assert raced(stages, uneven, rival, worst).images < 560
    assert raced(stages, uneven, rival, MEAN).images == 560


def test_answers_that_are_no_numbers_are_out():
    stages = stages_of(LABELS, seed=0, discard=True)
    rival = known(answers_of(stages, 0.5, torch.Generator().manual_seed(0)))
    broken = [{task: torch.full((len(p),), math.nan) for task, p in s.items()} for s in stages]
    run = raced(stages, broken, rival)
    assert run.images == 70
    assert math.isnan(run.total)
