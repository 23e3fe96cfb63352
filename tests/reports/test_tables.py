from dataclasses import replace

import pytest

from mergekit_lit.core.records import Record
from mergekit_lit.reports import tables


def test_experts_are_one_model_and_means_are_ordered(evaluation):
    rows = tables.scores(evaluation())
    averages = tables.means(rows)
    assert [row.model for row in averages] == ["base", "average", "adapted", "experts"]
    assert [round(row.accuracy, 6) for row in averages] == [0.3, 0.5, 0.95, 0.9]
    assert averages[-1].normalised == 1.0
    assert averages[-1].n == 300
    assert tables.tasks(rows) == ["digits", "letters", "<b>odd & name</b>"]
    assert tables.by_task(rows, "letters")["average"].interval == pytest.approx((0.45, 0.55))


def test_best_merge_ignores_methods_that_saw_test_images(evaluation):
    holds, told = tables.verdict(tables.scores(evaluation()))
    assert holds
    assert "best merge 0.500 (average)" in told


@pytest.mark.parametrize("merged", [(0.1, 0.2, 0.3), (0.95, 0.95, 0.95), (0.3, 0.3, 0.3)])
def test_verdict_says_when_the_order_fails(evaluation, merged):
    holds, told = tables.verdict(tables.scores(evaluation(merged=merged)))
    assert not holds
    assert "NOT" in told


def test_verdict_needs_all_three(evaluation):
    rows = [row for row in tables.scores(evaluation()) if row.role != "base"]
    assert tables.verdict(rows) is None


def test_record_without_models_has_no_rows():
    assert tables.scores(Record(stage="train", name="x", config={})) == []


def test_means_sort_merges_by_accuracy(evaluation):
    rows = tables.scores(evaluation())
    low = replace(tables.by_task(rows, None)["average"], model="low", accuracy=0.1)
    assert [row.model for row in tables.means([*rows, low])][1:3] == ["low", "average"]


def test_unknown_numbers_are_dashes():
    assert tables.number(None) == tables.UNKNOWN
    assert tables.number(0.12345) == "0.123"
    assert tables.interval(None) == ""
    assert tables.interval((0.1, 0.25), digits=2) == "[0.10, 0.25]"


def test_the_quoted_merge_is_chosen_on_val_where_val_was_measured(evaluation):
    rows = tables.scores(evaluation())
    average = tables.by_task(rows, None)["average"]
    others = [row for row in rows if row.model != "average"]
    low = replace(average, model="low", accuracy=0.35, val=0.9)
    high = replace(average, model="high", accuracy=0.55, val=0.8)
    assert tables.headline([low, high]).model == "low"
    assert "merge chosen on val 0.350 (low)" in tables.verdict([*others, low, high])[1]
    unmeasured = [replace(low, val=None), replace(high, val=None)]
    assert tables.headline(unmeasured).model == "high"
    assert tables.headline([]) is None
