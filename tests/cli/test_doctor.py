import json
import shlex
import sys
from importlib import metadata

import numpy as np
import pytest
from packaging.requirements import Requirement

# Imported here so that no test pays for Lightning.
import mergekit_lit.lit.loggers  # noqa: F401
from mergekit_lit.cli import doctor
from mergekit_lit.cli.doctor import (
    check_commands,
    check_disk,
    check_suite,
    check_versions,
    check_wandb,
)
from mergekit_lit.data.suites import load_suite


def versions_with(monkeypatch, name: str, version: str | None) -> dict[str, str]:
    """The row of one package if `version` were installed, or nothing."""
    real = metadata.version

    def pretended(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(doctor.metadata, "version", pretended)
    (row,) = (row for row in check_versions() if row["what"].startswith(f"{name} "))
    return row


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_releases_are_called_by_their_name(monkeypatch, version):
    row = versions_with(monkeypatch, "lightning", version)
    assert row["status"] == "broken"
    assert "steals credentials" in row["what"]
    assert "change every password" in row["mend"]


def test_old_and_missing_packages_are_broken_and_mended_by_pip(monkeypatch):
    old = versions_with(monkeypatch, "torch", "1.0")
    assert (old["status"], old["mend"][:15]) == ("broken", "pip install -U ")
    missing = versions_with(monkeypatch, "timm", None)
    assert missing["status"] == "broken"
    assert Requirement(missing["mend"].removeprefix("pip install ").strip("'")).name == "timm"


def test_a_healthy_machine_has_nothing_broken():
    rows = [*check_versions(), *check_wandb(), *check_commands()]
    assert [row for row in rows if row["status"] == "broken"] == []
    assert all(row["mend"] == "" for row in rows if row["status"] == "ok")


def test_a_full_disk_and_a_closed_folder_are_seen(tmp_path, monkeypatch):
    assert [row["status"] for row in check_disk(tmp_path)] == ["ok"]

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor, "_DISK_GB", 1e9)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    rows = list(check_disk(tmp_path))
    assert [row["status"] for row in rows] == ["warning", "broken"]
    assert "Read-only file system" in rows[1]["what"]


@pytest.mark.parametrize(
    ("mode", "key", "status"),
    [("offline", "", "ok"), ("online", "", "warning"), ("online", "k", "ok"), ("", "k", "warning")],
)
def test_the_state_of_wandb_is_told(monkeypatch, tmp_path, mode, key, status):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    (row,) = check_wandb()
    assert row["status"] == status


def test_a_foreign_lightning_is_noticed(monkeypatch, tmp_path):
    command = tmp_path / "lightning"
    monkeypatch.setattr(doctor.shutil, "which", lambda _: str(command))
    command.write_text("from lightning_sdk.cli.entrypoint import main_cli\n")
    (row,) = check_commands()
    assert row["status"] == "warning"
    assert "mergekit-lit run" in row["mend"]
    command.write_text("from mergekit_lit.cli.launch import lightning_main\n")
    assert [row["status"] for row in check_commands()] == ["ok"]


def test_something_broken_is_exit_code_1(monkeypatch, capsys):
    broken = {"area": "versions", "status": "broken", "what": "x", "mend": "y"}
    for name in ("check_versions", "check_devices", "check_wandb", "check_commands"):
        monkeypatch.setattr(doctor, name, list)
    monkeypatch.setattr(doctor, "check_disk", lambda _: [])
    monkeypatch.setattr(doctor, "check_suite", lambda *_, **__: [broken])
    assert doctor.run([]) == 1
    assert "Something is broken" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "check_suite", lambda *_, **__: [])
    assert doctor.run([]) == 0


def test_damaged_tasks_are_rows_with_a_mend_and_the_others_are_checked(tmp_path):
    one = {"y": np.array([0, 1, 1]), "split": np.array([0, 0, 1]), "classes": np.array(["a", "b"])}
    x = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "good.npz", x=x, **one)
    path = tmp_path / "bad.npz"
    np.savez(path, x=x, **one)
    # Flipped in the images: seen when they are read.
    whole = path.read_bytes()
    position = whole.index(x.tobytes()) + 9000
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    rows = list(check_suite(str(tmp_path), tasks=None, root=None, download=False))
    assert [row["status"] for row in rows] == ["broken", "ok"]
    assert "bad.npz' must be a whole npz file" in rows[0]["what"]
    assert rows[0]["mend"] == "Put the file back, or make it again."
    # Cut off: seen when the folder is listed.
    path.write_bytes(whole[:100])
    rows = list(check_suite(str(tmp_path), tasks=None, root=None, download=False))
    assert [row["status"] for row in rows] == ["broken", "ok"]
    assert "bad.npz" in rows[0]["what"]
    assert rows[0]["mend"] == "Mend it as told, or remove it."


def test_a_folder_without_tasks_is_a_row(tmp_path):
    (row,) = check_suite(str(tmp_path), tasks=None, root=None, download=False)
    assert row["status"] == "broken"
    assert row["mend"] == "put tasks into it, or name another folder"


def test_a_task_that_cannot_be_carved_is_a_row(tiny_suite, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("`reserve` must leave at least 2 images")

    monkeypatch.setattr("mergekit_lit.data.listing.carve", refuse)
    (row,) = check_suite(tiny_suite, tasks=["dots"], root=None, download=False)
    assert row["status"] == "broken"
    assert "dots cannot be read: `reserve` must leave" in row["what"]
    assert row["mend"]


def test_unknown_tasks_are_told_with_the_nearest(tiny_suite):
    with pytest.raises(KeyError, match="Did you mean 'dots'"):
        list(check_suite(tiny_suite, tasks=["dot"], root=None, download=False))


@pytest.mark.parametrize("suite", ["vision20", "paper20"])
def test_the_command_that_a_missing_task_names_fetches_it(monkeypatch, tmp_path, suite):
    asked = []

    def record(name, **options):
        asked.append({"name": name, **options})
        return []

    for name in ("check_versions", "check_devices", "check_wandb", "check_commands"):
        monkeypatch.setattr(doctor, name, list)
    monkeypatch.setattr(doctor, "check_disk", lambda _: [])
    monkeypatch.setattr(doctor, "check_suite", record)
    root = tmp_path / "a root"
    for task in load_suite(suite, root=root).tasks:
        command = task.remedy().partition("etch it: ")[2]
        if task.name == "sun397":
            assert command == ""
            continue
        program, name, *arguments = shlex.split(command)
        assert (program, name) == ("mergekit-lit", "doctor")
        assert doctor.run(arguments) == 0
        expected = {"name": suite, "tasks": [task.name], "root": root, "download": True}
        assert asked.pop() == expected


def test_what_loaders_print_does_not_stand_in_the_json(monkeypatch, capsys):
    def talk(*_, **__):
        sys.stdout.write("Downloading")
        return []

    monkeypatch.setattr(doctor, "check_suite", talk)
    assert doctor.run(["--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"]
    assert "Downloading" in captured.err
