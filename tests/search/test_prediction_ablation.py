"""The ablation of the predictor: variants differ in one thing, and are judged on what they say."""

import numpy as np
import pytest

from mergekit_lit.search.predicting.folds import leave_one_task_out
from mergekit_lit.search.predicting.predictors import alone
from mergekit_lit.search.predicting.rows import Rows

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("prediction_ablation")


@pytest.fixture
def rows():
    """Two merges of three groups of two of three tasks; the feature tells the change."""
    groups = [(g, pair) for g, pair in enumerate([("a", "b"), ("b", "c"), ("a", "c")])]
    every = [(g, m, task) for g, pair in groups for m in range(2) for task in pair]
    draw = np.random.default_rng(0)
    change, base = draw.normal(size=len(every)) * 0.1, draw.uniform(0.4, 0.6, size=len(every))
    return Rows(
        names=("change", "card"),
        features=np.column_stack([change, base - 0.05]),
        outcome=base + change,
        start=base,
        anchor=base - 0.05,
        unit=0.02,
        ends=(0.0, 1.0),
        task=np.array([task for _, _, task in every]),
        merge=np.array([f"{g}/{m}" for g, m, _ in every]),
        method=np.array([f"m{m}" for _, m, _ in every]),
        group=np.array([str(g) for g, _, _ in every]),
        backbone=np.array(["vit"] * len(every)),
        real=np.zeros(len(every), dtype=bool),
    )


def test_rows_are_joined_in_the_order_of_the_folds(script, rows):
    folds = list(leave_one_task_out(rows))
    joined = script.joined(rows, folds)
    assert joined.task.tolist() == [task for f in folds for task in f.test.task]
    assert joined.outcome.tolist() == [value for f in folds for value in f.test.outcome]


def test_who_knows_the_outcome_loses_nothing(script, rows):
    def oracle(_):
        return lambda new: new.outcome

    assert script.scores(rows, oracle) == ["1.00", "1.00", "0.000", "0.0"]
    worst = script.scores(rows, lambda train: lambda new: -alone("change")(train)(new))
    assert float(worst[0]) < 0
    assert float(worst[3]) > 0


def test_variants_hide_the_method_and_tell_from_a_feature(script, rows):
    assert set(script.unaware(rows).method) == {"any"}
    told = script.told_from(rows, "card")
    assert np.array_equal(told.start, rows.column("card"))
    assert np.allclose(told.reached(told.change), told.outcome)
