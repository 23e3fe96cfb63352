"""Tests of records and tables that experiments find finished."""

import gzip
import math
from pathlib import Path

import pytest

from mergekit_lit.core.records import Record


@pytest.fixture(scope="module")
def finished(experiment):
    return experiment("finished")


CONFIG = {
    "suite": "/here/real",
    "steps": (10, 20),
    "out": Path("here"),
    "effort": {"images": 64},
    "runs": ({"seed": 0, "out": Path("here")},),
}


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.json"
    Record(stage="s", name="n", config=CONFIG).write(path)
    return path


def test_a_record_of_the_same_configuration_passes_wherever_its_folders_are(finished, record):
    moved = {**CONFIG, "suite": "/there/real", "out": Path("there"), "later": 1}
    moved["runs"] = ({"seed": 0, "out": Path("there")},)
    finished.check_same(record, moved)
    finished.check_same(record.with_name("none.json"), CONFIG)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"suite": "embedded8"}, r"`suite` \('real' there, 'embedded8' now\)"),
        ({"steps": (10,)}, r"`steps` \(\[10, 20\] there, \[10\] now\)"),
        ({"effort": {"images": 32}}, r"`effort.images` \(64 there, 32 now\)"),
        ({"effort": {"images": 64, "more": 1}}, r"`effort.more` \(None there, 1 now\)"),
        ({"runs": ({"seed": 1, "out": Path()},)}, r"`runs.0.seed` \(0 there, 1 now\)"),
    ],
)
def test_a_record_of_another_configuration_is_refused(finished, record, changed, told):
    with pytest.raises(ValueError, match=told + r"\. Choose another --out"):
        finished.check_same(record, {**CONFIG, **changed})


def test_a_table_is_read_with_numbers_and_words(finished, tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"group,lr,measured_1,n\n12,0.1,True,\n"))
    (row,) = finished.read_table(path, "it.py", ["group", "lr"])
    assert (row["group"], row["lr"], row["measured_1"]) == ("12", 0.1, True)
    assert math.isnan(row["n"])
    with pytest.raises(ValueError, match=r"must be a table of it.py, but lacks the columns gap"):
        finished.read_table(path, "it.py", ["lr", "gap"])
    with pytest.raises(FileNotFoundError, match="No file"):
        finished.read_table(tmp_path / "none.csv", "it.py", [])
    (tmp_path / "empty.csv").write_text("lr\n")
    with pytest.raises(ValueError, match="must hold rows"):
        finished.read_table(tmp_path / "empty.csv", "it.py", [])
    (tmp_path / "plain.csv.gz").write_text("lr\n1\n")
    with pytest.raises(ValueError, match="must be a CSV table"):
        finished.read_table(tmp_path / "plain.csv.gz", "it.py", [])
