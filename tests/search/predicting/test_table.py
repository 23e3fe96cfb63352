"""The table of merges: its columns, and its way to the disk and back."""

import math

import pytest

from mergekit_lit.core.files import file_hash, read_json
from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES
from mergekit_lit.search.predicting.learning import SCALES, WORSE, learned_names
from mergekit_lit.search.predicting.table import (
    COLUMNS,
    FEATURES,
    SHIPPED,
    columns_told,
    feature_names,
    read_table,
    table_file,
    write_table,
)

WORDS = {"float32": 0.5, "int64": 3, "bool": True, "string": "x"}


def test_no_feature_is_an_outcome_or_named_like_one():
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    features = {column.name for own in FEATURES.values() for column in own}
    assert all(column.name.startswith("test_") for column in OUTCOMES)
    assert not [name for name in features if "test" in name]
    assert not features & {column.name for column in (*KEYS, *OUTCOMES)}
    assert {column.type for own in FEATURES.values() for column in own} == {"float32"}


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


def test_some_columns_are_read_alone(tmp_path):
    pytest.importorskip("pyarrow")
    row = {column.name: WORDS[column.type] for column in COLUMNS}
    write_table(tmp_path / "a.parquet", [row])
    assert read_table(tmp_path / "a.parquet", ["task", "survival"]) == [
        {"task": "x", "survival": 0.5}
    ]
    with pytest.raises(ValueError, match="the column 'nothing', but"):
        read_table(tmp_path / "a.parquet", ["nothing", "task"])
    (tmp_path / "b.parquet").write_text("text")
    with pytest.raises(ValueError, match="must be a table of merges, but is no Parquet"):
        read_table(tmp_path / "b.parquet")


def test_the_shipped_table_is_that_of_its_record():
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = table_file(SHIPPED)
    record = read_json(file.with_suffix(".json"))
    assert file_hash(file) == record["sha256"]
    assert file.stat().st_size < 2_000_000
    schema = parquet.read_schema(file)
    assert schema.names == [column.name for column in COLUMNS]
    types = {"float32": "float"} | {name: name for name in ("int64", "bool", "string")}
    assert [str(schema.field(c.name).type) for c in COLUMNS] == [types[c.type] for c in COLUMNS]
    keys = read_table(SHIPPED, ["backbone", "suite", "group", "merge", "task", "real"])
    assert len(keys) == record["rows"] == 8960
    assert len({tuple(row.values())[:4] for row in keys}) == record["merges"] == 1792
    assert {row["task"] for row in keys if row["real"]} == set(record["tasks"]["real"])


def test_what_is_learned_from_is_in_the_table():
    for level in ("cards", "data", "probe"):
        assert set(learned_names(level)) <= set(feature_names(level))
    assert set(WORSE) <= set(learned_names("probe"))
    starts = {pair for scale in SCALES.values() for pair in scale.starts}
    assert {known for known, _ in starts} <= set(learned_names("probe"))
    assert {measured for _, measured in starts} <= {column.name for column in OUTCOMES}


def test_every_column_is_told():
    told = columns_told().splitlines()
    assert len(told) == 2 + len(COLUMNS)
    assert all(line.replace(r"\|", "").count("|") == 5 for line in told)
