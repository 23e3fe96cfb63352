import subprocess
import sys

import pytest

from mergekit_lit import cli
from mergekit_lit.cli import COMMANDS, main, one_line


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert main([]) == 0


def test_help_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from mergekit_lit.cli import main; main(['--help']); "
        "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_an_unknown_command_is_told_with_the_nearest(capsys):
    assert main(["mrege"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mergekit-lit: error: No command named 'mrege'. Did you mean 'merge'?")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\n  b"), 2),
        (KeyError("No task named 'x'."), 2),
        (TypeError("t"), 2),
        (FileNotFoundError("No file 'x'."), 2),
        (ModuleNotFoundError("pip install x"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (SystemExit(None), 0),
    ],
)
def test_errors_become_one_line_and_a_code(monkeypatch, capsys, error, code):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["card"]) == code
    told = capsys.readouterr().err
    assert told.count("\n") == (code in (2, 130))
    assert "Traceback" not in told


def test_bugs_are_not_hidden(monkeypatch):
    def fail(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(RuntimeError):
        main(["card"])


def test_the_traceback_is_shown_when_asked_for(monkeypatch):
    monkeypatch.setenv("MERGEKIT_LIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mrege"):
        main(["mrege"])


def test_an_error_without_words_is_told_by_its_name():
    assert one_line(ValueError()) == "ValueError"
    assert one_line(KeyError("No 'x'.")) == "No 'x'."


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mergekit-lit 0.")
