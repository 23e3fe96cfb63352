"""Files are written whole or not at all, and failures say where and why."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from mergekit_lit.core import files


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def disk_full(*_arguments, **_keywords) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_replaces_the_old_file_and_makes_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    files.write_text(path, "old")
    files.write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert everything_in(path.parent) == ["a.txt"]


def test_failing_block_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(path, RuntimeError("halfway"))
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["a.txt"]


def test_files_take_their_places_together(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with files.together():
        files.write_text(tmp_path / "a", "new")
        files.write_text(tmp_path / "b", "new")
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "b").exists()
    assert [(tmp_path / name).read_text() for name in everything_in(tmp_path)] == ["new", "new"]


def write_one_and_a_half(folder: Path) -> None:
    with files.together():
        files.write_text(folder / "a", "new")
        write_half(folder / "b", RuntimeError("halfway"))


def test_none_takes_its_place_where_one_fails(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="halfway"):
        write_one_and_a_half(tmp_path)
    assert everything_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a", KeyboardInterrupt())
    assert everything_in(tmp_path) == []


def test_full_disk_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match=r"Could not write .*a\.json.*No space left") as caught:
        files.write_json(path, {"new": True})
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert json.loads(path.read_text()) == {"old": True}
    assert everything_in(tmp_path) == ["a.json"]


def test_full_disk_while_syncing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(OSError, match="Nothing was left half-written"):
        files.write_text(tmp_path / "a", "text")
    assert everything_in(tmp_path) == []


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Could not write"):
        files.write_text(tmp_path / "file" / "a", "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="Could not write"):
        files.write_text(tmp_path / "a", "text")
    tmp_path.chmod(0o700)


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "text")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_refuses_nan_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert everything_in(tmp_path) == []


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    files.write_json(tmp_path / "a", {"x": 1, "y": 2})
    files.write_json(tmp_path / "b", {"y": 2, "x": 1})
    assert files.file_hash(tmp_path / "a") == files.file_hash(tmp_path / "b")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_reading_what_is_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="must be a JSON file, but is not"):
        files.read_json(tmp_path / "a.json")


def test_reading_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file '.*a\.json'\."):
        files.read_json(tmp_path / "a.json")
