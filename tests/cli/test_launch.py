import os
import signal
import sys
import types
from importlib import metadata

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mergekit_lit.cli import launch, main
from mergekit_lit.cli.launch import lightning_main, run

ENVIRONMENT = [
    f"{prefix}{name}"
    for prefix in ("LT_", "PL_TRAINER_")
    for name in ("DEVICES", "NUM_NODES", "ACCELERATOR", "STRATEGY", "PRECISION")
]


@pytest.fixture
def launched(monkeypatch):
    """What torchrun would get; it is not started."""
    words: list[list[str]] = []
    for name in [*ENVIRONMENT, "LT_CLI_USED", "OMP_NUM_THREADS"]:
        # Set and deleted, so that what `run` exports is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "_torchrun", lambda given: words.append(given) or 0)
    return words


def test_a_command_becomes_a_module_and_keeps_its_words(launched):
    words = ["train", "--data.task", "mnist", "--steps=3"]
    assert run(["--devices", "2", *words]) == 0
    assert launched == [["--standalone", "--nproc_per_node=2", "-m", "mergekit_lit", *words]]


def test_a_script_and_a_module_are_targets_too(launched, tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    assert run(["--devices=3", str(script), "--devices", "7"]) == 0
    assert run(["-m", "mergekit_lit", "train"]) == 0
    assert launched[0][1:] == ["--nproc_per_node=3", str(script), "--devices", "7"]
    assert launched[1][2:] == ["-m", "mergekit_lit", "train"]


def test_fabric_and_trainer_find_the_choice_in_the_environment(launched):
    run(["--devices=0,1", "--accelerator=cpu", "--precision=64-true", "train"])
    assert launched[0][1] == "--nproc_per_node=2"
    for prefix in ("LT_", "PL_TRAINER_"):
        assert os.environ[f"{prefix}DEVICES"] == "0,1"
        assert os.environ[f"{prefix}ACCELERATOR"] == "cpu"
        assert os.environ[f"{prefix}PRECISION"] == "64-true"
        assert f"{prefix}STRATEGY" not in os.environ
    assert os.environ["LT_CLI_USED"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_several_machines_meet_at_an_address(launched):
    run(["--devices=4", "--num-nodes=2", "--node-rank=1", "--main-address=10.0.0.1", "train"])
    assert launched[0][:5] == [
        "--nproc_per_node=4",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29400",
    ]


@pytest.mark.parametrize("words", [["run"], ["run", "model"]])
def test_lightning_run_is_the_same(words, launched):
    assert lightning_main([*words, "--devices", "2", "train"]) == 0
    assert launched[0][1:] == ["--nproc_per_node=2", "-m", "mergekit_lit", "train"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices=two", "train"], "`devices` must be a number from 1"),
        (["--devices=0", "train"], "`devices` must be a number from 1"),
        (["nowhere.py"], "No script 'nowhere.py'"),
        (["trian"], "Did you mean 'train'?"),
        (["--device=2", "train"], "See: mergekit-lit run --help"),
        ([], "the following arguments are required"),
        (["--accelerator=abacus", "train"], "invalid choice: 'abacus'"),
    ],
)
def test_bad_words_are_told_in_one_line(words, message, launched, capsys):
    assert lightning_main(["run", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert launched == []


@pytest.mark.usefixtures("launched")
def test_ctrl_c_is_one_line_of_lightning_run(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_torchrun", interrupt)
    assert lightning_main(["run", "train"]) == 130
    assert capsys.readouterr().err == "lightning run: interrupted\n"


def test_the_first_of_several_processes_tells_why_it_ends(monkeypatch, tmp_path, capsys):
    """Under torchrun whichever comes first, which the folder that it hands out shows."""
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        assert main(["trian"]) == 2
        assert capsys.readouterr().err.count("\n") == (rank == "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["trian"]) == 2
        assert capsys.readouterr().err.count("\n") == (rank == "0")


def test_the_traceback_of_one_of_several_processes_goes_to_a_file(monkeypatch, tmp_path, capsys):
    def fail(_):
        raise RuntimeError("It burns.\nIn many places.")

    monkeypatch.setattr("mergekit_lit.cli._dispatch", fail)
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    assert main(["train"]) == 1
    told, trace = capsys.readouterr().err, tmp_path / "1" / "traceback.txt"
    assert told == (
        f"mergekit-lit: error: rank 5: RuntimeError: It burns. Where it comes from: {trace}\n"
    )
    assert "In many places." in trace.read_text()
    monkeypatch.setenv("MERGEKIT_LIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["train"])


@pytest.mark.parametrize(
    ("number", "advice"),
    [(signal.SIGKILL, "memory ran out"), (signal.SIGSEGV, "A library has crashed")],
)
def test_a_killed_process_is_named(number, advice, capsys):
    """One that is cut off by its death may have failed just before that is seen."""
    cut_off, killed = (ProcessFailure(n, 70 + n, code, "") for n, code in ((0, 1), (1, -number)))
    assert launch._failed(ChildFailedError("train", {4: cut_off, 5: killed})) == 128 + number
    told = capsys.readouterr().err
    assert f"rank 5 (process 71) was ended by {number.name}. " in told
    assert advice in told
    assert told.count("\n") == 1
    assert launch._failed(ChildFailedError("train", {4: cut_off})) == 1


def test_what_torchrun_ended_itself_is_not_why(capsys):
    wrong, ended = (
        ProcessFailure(rank, 100 + rank, code, "") for rank, code in ((1, 2), (0, -signal.SIGTERM))
    )
    assert launch._failed(ChildFailedError("train", {0: ended, 1: wrong})) == 2
    assert capsys.readouterr().err == ""
    assert launch._failed(ChildFailedError("train", {0: ended})) == 128 + signal.SIGTERM


@pytest.mark.parametrize("words", [["login"], ["run", "job", "x"], ["--help"], []])
def test_everything_else_is_lightning_sdk_s(words, monkeypatch, capsys):
    def absent(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(launch.metadata, "distribution", absent)
    assert lightning_main(words) == 2
    assert "usage: lightning run" in capsys.readouterr().err
    called = types.ModuleType("fake_lightning_sdk")
    called.main = lambda: 7
    monkeypatch.setitem(sys.modules, "fake_lightning_sdk", called)
    entry = metadata.EntryPoint("lightning", "fake_lightning_sdk:main", "console_scripts")
    sdk = types.SimpleNamespace(entry_points=metadata.EntryPoints([entry]))
    monkeypatch.setattr(launch.metadata, "distribution", lambda _: sdk)
    assert lightning_main(words) == 7
