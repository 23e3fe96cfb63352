"""The command line: `main` picks a command, runs it, and tells errors in one line."""

import atexit
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mergekit_lit.core.registry import unknown_name

COMMANDS: Final = {
    "quickstart": "Train 8 experts, merge them, score them and write a report: the whole path.",
    "train": "Fine-tune one expert, or one a task.",
    "merge": "Merge experts of one base into one model.",
    "tune": "Choose methods and their parameters on validation images.",
    "sweep": "Run train, merge or evaluate at every point of a YAML file's axes, none twice.",
    "recommend": "Recommend how to train experts that merge well, before they are trained.",
    "predict": "Predict what merges will reach, with intervals, without scoring them.",
    "bound": "Tell what bounds the excess error of a merge, term by term.",
    "constants": "Measure what the bound takes: noise, heterogeneity, smoothness, with intervals.",
    "evaluate": "Score base, experts and merged models on the tasks of a suite.",
    "report": "Write the page of a run folder: tables and figures from its records.",
    "card": "Print what a file holds: kind, card, structure, method.",
    "tasks": "List suites and tasks: sizes, source, licence, whether they are here.",
    "methods": "List the merge methods and their parameters.",
    "doctor": "Check data, versions, devices, disk and W&B, and say how to mend each.",
    "run": "Start a script, or one of these commands, in several processes.",
}
"""Every command and what it does; the module of the same name holds its `run(argv)`."""

# Ctrl-C and a closed pipe, as shells count them: 128 + the signal's number.
_INTERRUPTED, _BROKEN_PIPE, _WRONG_INPUT, _FAILED = 130, 141, 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Errors of input are told in one line on stderr, with exit code 2; MERGEKIT_LIT_TRACEBACK=1
    shows where they come from.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The last search for garbage among all of torch takes seconds, and the process ends anyway.
    atexit.register(gc.freeze)
    try:
        return _dispatch(arguments)
    except SystemExit as request:
        notes = getattr(request, "__notes__", ())
        if notes:
            _tell(f"mergekit-lit: {' '.join(notes)}", alone=False)
        return request.code if isinstance(request.code, int) else int(request.code is not None)
    except KeyboardInterrupt:
        _tell("mergekit-lit: interrupted", alone=False)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left; point stdout elsewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        if os.environ.get("MERGEKIT_LIT_TRACEBACK") == "1":
            raise
        _tell(f"mergekit-lit: error: {one_line(error)}", alone=True)
        return _WRONG_INPUT
    except Exception as error:
        return _failed(error)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, and without the quotes that KeyError adds."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _failed(error: Exception) -> int:
    """Tell an unforeseen error in one line, in one of several processes, and return the exit code.

    The first that fails makes the others fail as well: on the screen, the traces of all would hide
    why. Each writes its own into the folder that torchrun gives it; without one, it is raised.
    """
    ours = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not ours or os.environ.get("MERGEKIT_LIT_TRACEBACK") == "1":
        raise error
    trace = Path(ours).with_name("traceback.txt")
    trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first, *_ = str(error).strip().splitlines() or [""]
    told = f"rank {os.environ.get('RANK')}: {type(error).__name__}: {first}"
    _tell(f"mergekit-lit: error: {told} Where it comes from: {trace}", alone=True)
    return _FAILED


def _tell(line: str, *, alone: bool) -> None:
    """Print a line on stderr; of several processes that a launcher started, only one does.

    Args:
        line: why this process ends.
        alone: whether a process that works together with others may end so by itself.
    """
    if _is_first_to_tell() or (alone and _has_joined_others()):
        print(line, file=sys.stderr)


def _is_first_to_tell() -> bool:
    """Whether no other process of this launch and machine tells why it ends.

    Processes that are given the same words refuse them alike, in any order; torchrun then ends
    those that have not come so far. It gives them a folder in common, for the first to leave a mark
    in. Elsewhere the first process tells.
    """
    shared = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if shared:
        try:
            Path(shared).parents[1].joinpath("told").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def _has_joined_others() -> bool:
    """Whether this process has met others, without a folder in common to leave a mark in."""
    # Nothing is imported for it; and there are builds of torch without it.
    joined = getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)
    return bool(joined()) and "TORCHELASTIC_ERROR_FILE" not in os.environ


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from importlib import metadata

        print(f"mergekit-lit {metadata.version('mergekit-lit')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise ValueError(unknown_name("command", name, COMMANDS))
    module = "launch" if name == "run" else name
    code: int = importlib.import_module(f"mergekit_lit.cli.{module}").run(arguments[1:])
    return code


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mergekit-lit COMMAND [options]",
            "",
            "Fine-tune experts, merge them, evaluate and explain the result.",
            "",
            *lines,
            "",
            "Each command explains its parameters: mergekit-lit COMMAND --help",
            "Parameters come from flags (--key value) or files (--config FILE.yaml, repeatable);",
            "a YAML key is the name of a flag, and flags win.",
        ]
    )
