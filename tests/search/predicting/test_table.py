"""The table of merges: its columns, and its way to the disk and back."""

import math

import pytest

from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES
from mergekit_lit.search.predicting.table import (
    COLUMNS,
    FEATURES,
    columns_told,
    feature_names,
    read_table,
    write_table,
)

WORDS = {"float64": 0.5, "int64": 3, "bool": True, "string": "x"}


def test_no_feature_is_an_outcome_or_named_like_one():
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    features = {column.name for own in FEATURES.values() for column in own}
    assert all(column.name.startswith("test_") for column in OUTCOMES)
    assert not [name for name in features if "test" in name]
    assert not features & {column.name for column in (*KEYS, *OUTCOMES)}
    assert {column.type for own in FEATURES.values() for column in own} == {"float64"}


def test_levels_add_to_one_another():
    cards, data, probe = map(feature_names, ("cards", "data", "probe"))
    assert cards == data[: len(cards)]
    assert data == probe[: len(data)]
    assert "probe_val_accuracy" not in data
    assert "base_val_accuracy" not in cards


def test_rows_come_back_typed(tmp_path):
    pytest.importorskip("pyarrow")
    row = {column.name: WORDS[column.type] for column in COLUMNS}
    write_table(tmp_path / "a.parquet", [row, {**row, "test_loss": None, "task": "other"}])
    first, second = read_table(tmp_path / "a.parquet")
    assert first == row
    assert math.isnan(second["test_loss"])
    with pytest.raises(ValueError, match="'task' is missing"):
        write_table(tmp_path / "b.parquet", [{k: v for k, v in row.items() if k != "task"}])


def test_every_column_is_told():
    told = columns_told().splitlines()
    assert len(told) == 2 + len(COLUMNS)
    assert all(line.replace(r"\|", "").count("|") == 5 for line in told)
