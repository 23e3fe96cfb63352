"""Records: plain JSON, round trips, volatile facts filled in."""

import json
from pathlib import Path

import pytest

from mergekit_lit.core.records import Record, Stopwatch, plain


def test_round_trip(tmp_path):
    record = Record(
        stage="merge", name="a", config={"path": Path("x"), "pair": (1, 2)}, seeds={"merge": 3}
    )
    record.write(tmp_path / "a.record.json")
    read = Record.read(tmp_path / "a.record.json")
    assert read.config == {"path": "x", "pair": [1, 2]}
    assert (read.stage, read.name, read.seeds) == ("merge", "a", {"merge": 3})


def test_plain_values():
    odd = {1: float("nan"), "i": float("-inf"), "n": None, "b": True, "l": [Path("a"), (2.5,)]}
    assert plain(odd) == {"1": None, "i": None, "n": None, "b": True, "l": ["a", [2.5]]}


def test_stopwatch_fills_in_the_volatile_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Stopwatch().finish(Record(stage="merge", name="a", config={}))
    assert record.seconds >= 0
    assert record.peak_memory_mb > 10
    assert record.git_commit is None
    assert set(record.versions) == {"python", "torch", "lightning", "mergekit-lit"}
    assert record.finished.endswith("+00:00")
    record.write(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("value", [{"colour": 1}, {"stage": "merge"}])
def test_json_that_is_no_record(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="must be a record, but is not"):
        Record.read(tmp_path / "a.json")


@pytest.mark.parametrize("value", [[], 3, None, "text"])
def test_json_that_is_no_mapping(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="must be a record, but is not"):
        Record.read(tmp_path / "a.json")
