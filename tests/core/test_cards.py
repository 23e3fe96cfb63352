"""Cards: nulls, round trips, and keys of other versions."""

import inspect
import json
from dataclasses import fields

import pytest

from mergekit_lit.core.cards import Card

FULL = Card(task="mnist", lr=0.03, betas=(0.9, 0.999), steps=200, travel=12.5, classes=10)


@pytest.mark.parametrize("card", [Card(), FULL])
def test_round_trip_through_json(card):
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_unknown_is_null_and_stays_in_the_file():
    value = Card().to_json()
    assert set(value) == {field.name for field in fields(Card)}
    assert set(value.values()) == {None}


def test_keys_of_newer_versions_are_left_out():
    assert Card.from_json({"task": "mnist", "colour": "red"}) == Card(task="mnist")


def test_cards_are_frozen():
    with pytest.raises(AttributeError):
        FULL.task = "other"


def test_every_field_is_documented():
    documented = inspect.getdoc(Card) or ""
    assert [f.name for f in fields(Card) if f"\n    {f.name}: " not in documented] == []
