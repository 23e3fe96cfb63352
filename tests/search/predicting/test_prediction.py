from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.search.predicting import judging, predictors
from mergekit_lit.search.predicting.folds import (
    SPLITS,
    Fold,
    embedded_to_real,
    leave_groups_out,
    leave_one_task_out,
)
from mergekit_lit.search.predicting.intervals import (
    calibrated,
    cross_calibrated,
    held_out,
    merges_of,
)
from mergekit_lit.search.predicting.judging import judge, judge_intervals, regrets, spearman
from mergekit_lit.search.predicting.rows import Rows, mean_by

NAMES = ("expert_val_accuracy", "interference", "noise")


def rows_of(*, groups=40, seed=0, spread=0.03, tasks=12):
    """Merges whose tasks fall short of their experts in proportion to the interference."""
    draw = np.random.default_rng(seed)
    ease = draw.uniform(0.5, 0.95, tasks)
    table = []
    for group in range(groups):
        members = draw.choice(tasks, size=draw.integers(2, 5), replace=False)
        for merge in range(4):
            for task in members:
                expert, blocked = ease[task] + draw.normal(0, 0.02), draw.uniform(0, 1)
                value = expert - 0.3 * blocked + draw.normal(0, spread)
                table.append((group, merge, task, expert, blocked, np.clip(value, 0, 1)))
    group, merge, task, expert, blocked, value = map(np.array, zip(*table, strict=True))
    features = np.stack([expert, blocked, draw.normal(size=len(task))], axis=1)
    return Rows(
        names=NAMES,
        features=features,
        outcome=value,
        start=expert,
        anchor=expert,
        unit=0.02,
        ends=(0, 1),
        task=np.char.add("t", task.astype(str)),
        merge=np.char.add(np.char.add(group.astype(str), "/"), merge.astype(str)),
        method=np.where(merge == 0, "average", "ties"),
        group=group.astype(str),
        backbone=np.where(group % 2, "vit", "resnet"),
        real=group >= groups // 2,
    )


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(judging, "_DRAWS", 20)


@pytest.fixture(scope="module")
def rows():
    return rows_of()


def test_a_task_is_held_out_with_every_merge_it_has_a_part_in(rows):
    folds = list(leave_one_task_out(rows))
    assert [fold.name for fold in folds] == sorted(set(rows.task))
    for fold in folds:
        assert set(fold.test.task) == {fold.name}
        assert not set(fold.test.merge) & set(fold.train.merge)
        assert fold.name not in set(fold.train.task)
    assert sum(len(fold.test) for fold in folds) == len(rows)


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_held_out_is_never_learned_from(rows, name):
    folds = list(SPLITS[name](rows))
    assert folds
    for fold in folds:
        assert len(fold.train)
        assert not set(fold.test.merge) & set(fold.train.merge)


def test_whole_groups_are_held_out(rows):
    folds = list(leave_groups_out(rows))
    assert len(folds) == 10
    assert all(not set(fold.test.group) & set(fold.train.group) for fold in folds)


def test_without_real_tasks_nothing_goes_there(rows):
    assert list(embedded_to_real(replace(rows, real=np.zeros(len(rows), bool)))) == []


@pytest.mark.parametrize(
    "fit",
    [predictors.Boosting({"interference": -1}, trees=60), predictors.linear],
    ids=["trees", "linear"],
)
def test_a_law_is_found(rows, fit):
    found = judge(list(leave_groups_out(rows))[:3], fit)
    assert found.pooled > 0.9
    assert found.error < 0.05
    # Choosing among four merges of a group by interference loses what the noise hides.
    assert np.mean(found.regrets) < 0.02


def test_nulls_are_what_they_say(rows):
    folds = list(leave_one_task_out(rows))
    assert judge(folds, predictors.constant).per_fold == {fold.name: 0.0 for fold in folds}
    assert judge(folds, predictors.alone("interference", sign=-1), order_alone=True).pooled > 0.3
    assert judge(folds, predictors.alone("noise"), order_alone=True).error is None
    tasks = predictors.task_mean(rows)(rows)
    assert np.unique(tasks[rows.task == "t3"]) == pytest.approx(
        rows.outcome[rows.task == "t3"].mean()
    )


def test_trees_never_rise_where_theory_says_so(rows):
    predict = predictors.Boosting({"interference": -1}, trees=60)(rows)
    ladder = np.linspace(0, 1, 50)
    steps = rows.at(np.zeros(50, int))
    steps = replace(steps, features=np.stack([steps.features[:, 0], ladder, 0 * ladder], axis=1))
    assert (np.diff(predict(steps)) <= 1e-12).all()


def test_what_no_measured_row_knows_is_not_learned_from(rows):
    fit = predictors.Boosting({"interference": -1}, trees=5)
    nowhere = rows.features.copy()
    nowhere[:, 2] = np.nan
    blind = fit(replace(rows, features=nowhere))
    less = rows.with_features(NAMES[:2])
    assert np.array_equal(blind(rows), fit(less)(less))


def test_the_same_rows_give_the_same_predictions(rows):
    fit = predictors.Boosting({"interference": -1}, trees=60)
    assert np.array_equal(fit(rows)(rows), fit(rows)(rows))


def test_intervals_hold_as_many_outcomes_as_they_say():
    train, new = rows_of(seed=1), rows_of(seed=2, groups=200)
    model = calibrated(predictors.linear, train)
    found = judge_intervals([Fold("new", train, new)], [model])
    assert 0.85 < found.coverage < 0.96
    assert 0.85 < found.merge_coverage < 0.97
    assert model.merge_width < model.row_width


def test_intervals_of_folds_rest_on_the_other_folds(rows):
    folds = list(leave_groups_out(rows))
    odd = replace(folds[0].test, outcome=folds[0].test.outcome - 9)
    moved = [replace(folds[0], test=odd), *folds[1:]]
    before, after = (cross_calibrated(predictors.linear, each) for each in (folds, moved))
    assert after[0] == replace(before[0], predict=after[0].predict)
    assert after[1].row_width > 10 * before[1].row_width
    found = judge_intervals(folds, before)
    assert 0.85 < found.coverage < 0.95


def test_intervals_widen_where_less_is_known(rows):
    whole = calibrated(predictors.linear, rows)
    blind = calibrated(predictors.linear, rows.with_features(["noise"]))
    assert blind.row_width > 2 * whole.row_width


def half_widths(model, rows):
    """Mean half-widths of rows and of merges over held out rows, before they are cut off."""
    held = held_out(predictors.linear, rows)
    spread = np.concatenate([part.spread for part in held])
    means = mean_by(np.concatenate([part.merge for part in held]), spread)[1]
    return model.row_width * spread.mean(), model.merge_width * means.mean()


@pytest.mark.parametrize("anchor", ["the same", "none"])
def test_intervals_are_never_narrower_where_less_is_known(rows, anchor):
    # Where the noise is what is known more, knowing less would make them narrower.
    draw = np.random.default_rng(3)
    noisy = rows.features + np.where([True, True, False], draw.normal(size=(len(rows), 3)), 0)
    poor = (
        rows if anchor == "the same" else replace(rows, start=0 * rows.start, anchor=0 * rows.start)
    )
    whole = replace(rows, features=noisy)
    more = held_out(predictors.linear, whole)
    least = half_widths(calibrated(predictors.linear, whole), whole)
    alone = half_widths(calibrated(predictors.linear, poor), poor)
    found = half_widths(calibrated(predictors.linear, poor, at_least=more), poor)
    assert found == pytest.approx(np.maximum(alone, least))
    assert alone[0] < least[0]


def test_a_mean_of_several_fits_is_as_unsure_as_the_least_sure(rows):
    one = rows.at(rows.merge == rows.merge[0])
    places = np.arange(len(one))
    sure = calibrated(predictors.linear, rows)
    alike = merges_of([(sure, one.at(places[:1])), (sure, one.at(places[1:]))])
    assert alike.value == pytest.approx(sure.merges(one).value)
    unsure = replace(sure, merge_width=2 * sure.merge_width)
    free = replace(one, ends=(-9, 9))
    width, wider = (
        np.ptp([found.low, found.high])
        for found in (
            sure.merges(free),
            merges_of([(sure, free.at(places[:1])), (unsure, free.at(places[1:]))]),
        )
    )
    assert wider == pytest.approx(2 * width)


def test_held_out_predictions_never_saw_their_task(rows):
    seen = []

    def fit(train):
        seen.append(set(train.task))
        return lambda new: np.array([float(task in seen[-1]) for task in new.task])

    held = held_out(fit, rows)
    assert len(seen) == 8
    assert not any(part.found.any() for part in held)


def test_every_task_in_every_merge_leaves_nothing_to_learn_from(rows):
    one = rows.at(rows.merge == rows.merge[0])
    with pytest.raises(ValueError, match="Give more groups"):
        calibrated(predictors.constant, one)


def test_regret_is_what_choosing_loses(rows):
    small = rows.at(np.isin(rows.group, ["0", "1"]))
    assert regrets(small, small.outcome) == pytest.approx([0, 0])
    worst = regrets(small, -small.outcome)
    for group, lost in zip(["0", "1"], worst, strict=True):
        part = small.group == group
        means = mean_by(small.merge[part], small.outcome[part])[1]
        assert lost == pytest.approx(np.ptp(means))


def test_always_one_method_and_the_best_on_average_lose_what_they_must(rows):
    better = rows.method == "ties"
    raised = replace(rows, start=0 * rows.start, outcome=0.5 + 0.05 * better)
    folds = list(leave_groups_out(raised))
    lost = {
        name: judge(folds, fit).regrets
        for name, fit in {
            "average": predictors.always("average"),
            "best": predictors.method_mean,
        }.items()
    }
    assert lost["average"] == pytest.approx([0.05] * 40)
    assert lost["best"] == pytest.approx([0] * 40)


def test_a_judgement_tells_cells_and_how_sure_it_is(rows):
    found = judge(list(leave_one_task_out(rows)), predictors.linear)
    low, high = found.per_fold_within
    assert low < np.mean(list(found.per_fold.values())) < high
    assert found.pooled_within[0] < found.pooled < found.pooled_within[1]
    assert found.regret_within[0] <= np.mean(found.regrets) <= found.regret_within[1]
    assert {name.split("/")[0] for name in found.per_cell} == {"resnet", "vit"}


def test_tasks_of_the_same_images_are_held_out_together(rows):
    named = replace(rows, task=np.where(rows.task == "t1", "fashion", rows.task))
    named = replace(named, task=np.where(named.task == "t2", "fashionmnist", named.task))
    folds = {fold.name: fold for fold in leave_one_task_out(named)}
    assert "fashionmnist" not in folds
    assert set(folds["fashion"].test.task) == {"fashion", "fashionmnist"}
    assert not {"fashion", "fashionmnist"} & set(folds["fashion"].train.task)


def test_intervals_are_wider_where_more_is_expected_to_change(rows):
    found = calibrated(predictors.linear, rows)
    told = found.rows(rows)
    width = told.high - told.low
    inside = (told.low > 0) & (told.high < 1)
    change = np.abs(told.value - rows.anchor)
    assert spearman(width[inside], change[inside]) == pytest.approx(1)


def test_a_constant_has_no_rank():
    assert spearman(np.arange(5.0), np.ones(5)) == 0
    assert spearman(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
