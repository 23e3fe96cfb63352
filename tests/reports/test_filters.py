"""Conditions on results: what they choose, and what is refused in one line."""

import pytest

from mergekit_lit.reports.filters import Condition, chosen, full_name, read_conditions

ROWS = [
    {"model.lr": 0.01, "task": "mnist", "model.nesterov": True, "steps": 100},
    {"model.lr": 0.03, "task": "letters", "model.nesterov": False, "steps": 200},
    {"model.lr": 0.1, "task": "mnist", "density": None, "steps": 200},
]


def kept(text):
    return [ROWS.index(row) for row in chosen(ROWS, read_conditions(text))]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("model.lr=0.01", [0]),
        ("model.lr==1e-2", [0]),
        ("lr = 0.01, 0.03", [0, 1]),
        ("model.lr>=0.03", [1, 2]),
        ("model.lr>0.03", [2]),
        ("model.lr<0.03", [0]),
        ("model.lr<=0.03,task=mnist", [0]),
        ("task!=mnist", [1]),
        ("data.task!=mnist", [1]),
        ("task=mnist,letters,steps=200", [1, 2]),
        ("nesterov=true", [0]),
        ("nesterov!=true", [1, 2]),
        ("density=null,model.lr>0.05", [2]),
    ],
)
def test_conditions_choose_rows(text, rows):
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold conditions"),
        ("mnist", "must hold conditions"),
        ("task=mnist,", "must hold conditions"),
        ("__import__('os').system('false')", "must hold conditions"),
        ("model.lr>=many", "compare with one number"),
        ("model.lr>=1,2", "compare with one number"),
        ("model.lr>=nan", "compare with one number"),
        ("model.lrr=1", "Did you mean 'model.lr'"),
        ("task=fashion", "none has task=fashion; its values: letters, mnist"),
        ("task=mnist,model.lr=0.03", "must leave some results"),
    ],
)
def test_wrong_input_is_told_in_one_line(text, message):
    with pytest.raises((ValueError, KeyError)) as caught:
        kept(text)
    assert message in caught.value.args[0]
    assert "\n" not in caught.value.args[0]


def test_a_short_name_must_be_unique():
    rows = [{"model.seed": 0, "data.seed": 1}]
    with pytest.raises(KeyError, match=r"may be any of data\.seed, model\.seed"):
        full_name("seed", rows)
    assert full_name("seed", [*rows, {"seed": 2}]) == "seed"


def test_values_are_text_and_never_run():
    assert read_conditions("a=__import__('os')") == (Condition("a", "=", ("__import__('os')",)),)
