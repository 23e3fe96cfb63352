import os

import pytest

from mergekit_lit.stages.folders import check_folder


def test_folders_that_are_there_or_can_be_made_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, tmp_path / "deep" / "run", (tmp_path / "x").relative_to(tmp_path)):
        check_folder(out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`out` must be a folder, but '.*file' is a file"):
        check_folder(tmp_path / "file" / below)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    # The superuser may write anywhere, so the mode of the folder would prove nothing.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="can be written"):
        check_folder(tmp_path / "run")
