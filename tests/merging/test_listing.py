"""The table of methods: plain JSON, complete, and true to the signatures."""

import inspect
import json

import pytest

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import methods_table

ROWS = {row["name"]: row for row in methods_table()}


def test_table_is_plain_json_and_sorted():
    rows = methods_table()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert set(ROWS) == set(MERGE_METHODS.names())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_cell_is_filled(name):
    row = ROWS[name]
    assert {key for key in ("family", "form", "data", "source", "summary") if not row[key]} == set()
    for parameter in row["parameters"]:
        assert parameter["help"], f"{parameter['name']} is not explained"
        assert parameter["type"]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_defaults_are_those_of_the_signature(name):
    signature = inspect.signature(MERGE_METHODS.get(name).function)
    for parameter in ROWS[name]["parameters"]:
        default = signature.parameters[parameter["name"]].default
        assert parameter["required"] == (default is inspect.Parameter.empty)
        assert parameter["default"] == (None if parameter["required"] else default)


def test_one_row_in_full():
    assert ROWS["task_arithmetic"]["parameters"] == [
        {
            "name": "scale",
            "type": "a finite number",
            "default": 0.3,
            "required": False,
            "help": "length of the step, >= 0; 0 gives the base, 1/T the average. About 0.3 suits "
            "8 experts; more experts want less.",
            "search": [0.0, 1.5],
        }
    ]
