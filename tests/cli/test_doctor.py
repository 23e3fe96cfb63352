from importlib import metadata

import pytest
from packaging.requirements import Requirement

# Imported here so that no test pays for Lightning.
import mergekit_lit.lit.loggers  # noqa: F401
from mergekit_lit.cli import doctor
from mergekit_lit.cli.doctor import check_commands, check_disk, check_versions, check_wandb


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
    monkeypatch.setattr(doctor, "check_suite", lambda *_: [broken])
    assert doctor.run([]) == 1
    assert "Something is broken" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "check_suite", lambda *_: [])
    assert doctor.run([]) == 0
