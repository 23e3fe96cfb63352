"""The index of records: as good as reading them all, whatever happens to either."""

import json
import os
import sqlite3

import pytest

from mergekit_lit.core.files import write_json, write_text
from mergekit_lit.core.records import Record
from mergekit_lit.reports import index
from mergekit_lit.reports.index import INDEX, load_entries, settings_of


@pytest.fixture
def folder(tmp_path, evaluation):
    """Three trainings and an evaluation."""
    for number in range(3):
        write_training(tmp_path / f"runs/{number}/a.record.json", lr=number / 10)
    evaluation().write(tmp_path / "runs/3/scores.record.json")
    return tmp_path


def write_training(path, *, lr):
    card = {"task": "mnist", "steps": 5, "val_accuracy": lr, "val_loss": None}
    config = {"model": {"lr": lr, "betas": [0.9, 0.99]}, "data": {"task": "mnist"}}
    metrics = {"experts": {"mnist": card}}
    Record(stage="train", name="mnist", config=config, metrics=metrics).write(path)


@pytest.fixture
def reads(monkeypatch):
    """The paths of the records that were read."""
    seen = []
    read = index._row
    monkeypatch.setattr(index, "_row", lambda *given: (seen.append(given[1]), read(*given))[1])
    return seen


def test_an_entry_tells_settings_and_what_was_measured(folder):
    entries = load_entries(folder)
    assert [entry.path for entry in entries] == [
        *(f"runs/{number}/a.record.json" for number in range(3)),
        "runs/3/scores.record.json",
    ]
    assert entries[1].settings == {
        "model.lr": 0.1,
        "model.betas": "[0.9, 0.99]",
        "data.task": "mnist",
    }
    assert entries[1].results == ({"task": "mnist", "steps": 5, "val_accuracy": 0.1},)
    assert {row["model"] for row in entries[3].results} == {
        "base",
        "average",
        "adapted",
        "experts",
    }


def test_a_second_look_reads_no_record_and_writes_nothing(folder, reads):
    first = load_entries(folder)
    stat = (folder / INDEX).stat()
    reads.clear()
    assert load_entries(folder) == first == load_entries(folder, index=False)
    assert reads == [entry.path for entry in first]  # without the index, all of them
    assert (folder / INDEX).stat().st_ino == stat.st_ino


def test_only_what_changed_came_or_went_is_read_and_the_index_is_as_if_made_anew(folder, reads):
    load_entries(folder)
    reads.clear()
    changed = folder / "runs/1/a.record.json"
    stat = changed.stat()
    write_training(changed, lr=0.7)  # of the same size, so that only the time tells
    assert changed.stat().st_size == stat.st_size
    (folder / "runs/0/a.record.json").unlink()
    write_training(folder / "runs/4/a.record.json", lr=0.4)
    entries = load_entries(folder)
    assert reads == ["runs/1/a.record.json", "runs/4/a.record.json"]
    assert entries[0].settings["model.lr"] == 0.7
    incremental = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    assert load_entries(folder) == entries
    assert (folder / INDEX).read_bytes() == incremental


def test_a_change_that_keeps_the_time_is_noticed_by_the_size(folder):
    load_entries(folder)
    path = folder / "runs/1/a.record.json"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    write_training(path, lr=0.125)
    os.utime(path, ns=times)
    assert load_entries(folder)[1].settings["model.lr"] == 0.125


@pytest.mark.parametrize("text", ["{", '{"stage": "train"}', '{"stage": 1, "odd": 2}', "\udcff"])
def test_a_damaged_record_is_told_and_hides_no_other(folder, text):
    path = folder / "runs/1/a.record.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for _ in range(2):  # read, and read again
        entries = load_entries(folder)
        assert [entry.path for entry in entries if entry.error] == ["runs/1/a.record.json"]
        assert len(entries) == 4
        assert "\n" not in entries[1].error
    write_training(path, lr=0.1)
    assert not any(entry.error for entry in load_entries(folder))


def test_results_of_another_form_are_damage_too(folder):
    record = json.loads((folder / "runs/1/a.record.json").read_text())
    record["metrics"]["experts"] = [1]
    write_json(folder / "runs/1/a.record.json", record)
    assert load_entries(folder)[1].error


def test_other_json_is_left_alone(folder):
    write_text(folder / "other.record.json", '{"a": 1}')
    assert len(load_entries(folder)) == len(load_entries(folder)) == 4


@pytest.mark.parametrize("damage", ["garbage", "cut", "version", "table"])
def test_an_index_that_cannot_be_used_is_made_anew(folder, damage):
    first = load_entries(folder)
    path = folder / INDEX
    whole = path.read_bytes()
    if damage in ("garbage", "cut"):
        path.write_bytes(b"no database" * 99 if damage == "garbage" else whole[:5000])
    else:
        with sqlite3.connect(path) as connection:
            words = {"version": "PRAGMA user_version = 0", "table": "DROP TABLE records"}
            connection.execute(words[damage])
        connection.close()
    assert load_entries(folder) == first
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(index, "atomic_path", refuse)
    assert len(load_entries(folder)) == 4
    assert not (folder / INDEX).exists()


def test_no_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="none at"):
        load_entries(tmp_path / "absent")


def test_the_recipe_of_a_merge_is_told_as_its_flags():
    recipe = {"method": "ties", "scale": 0.5, "config": {"density": 0.2}}
    record = Record(stage="merge", name="m", config={"experts": ["a"], "recipe": recipe})
    assert settings_of(record) == {
        "experts": '["a"]',
        "method": "ties",
        "scale": 0.5,
        "density": 0.2,
    }
