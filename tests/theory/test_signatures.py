"""Each signature of failure, alone."""

import dataclasses

import pytest

from mergekit_lit.theory.signatures import Symptoms, signatures

WELL = Symptoms(
    lr=0.1,
    eigenvalue=10.0,
    base_loss={"a": 1.0, "b": 2.0},
    merged_loss={"a": 0.8, "b": 1.5},
    expert_loss={"a": 0.1, "b": 0.2},
    gap={"a": 0.1, "b": 0.1},
    gradient2=1.0,
    zeta2={"a": 1.0, "b": 1.5},
)


def test_none_where_all_is_well():
    assert signatures(WELL) == []


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"eigenvalue": 21.0}, "Large learning rate"),
        ({"merged_loss": {"a": 1.5, "b": 1.6}}, "Over-specialised"),
        ({"gradient2": 0.5}, "Diverse tasks"),
        ({"gradient2": -0.1}, "Diverse tasks"),
    ],
)
def test_each_alone(changes, start):
    (found,) = signatures(dataclasses.replace(WELL, **changes))
    assert found.startswith(start)


def test_the_larger_part_of_an_excess_is_told():
    worse = dataclasses.replace(WELL, merged_loss={"a": 1.5, "b": 1.6})
    assert "training loss (drift)" in signatures(worse)[0]
    gaping = dataclasses.replace(worse, gap={"a": 3.0, "b": 3.0})
    assert "test loss alone (stability)" in signatures(gaping)[0]


def test_what_cards_do_not_tell_is_no_symptom():
    unknown = dataclasses.replace(
        WELL,
        lr=None,
        expert_loss={"a": None, "b": None},
        merged_loss={"a": 9.0, "b": 9.0},
    )
    assert signatures(unknown) == []
