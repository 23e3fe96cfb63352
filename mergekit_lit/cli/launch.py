"""This file starts several processes: `mergekit-lit run`, and `lightning run`, which we ship.

Lightning renamed `lightning run` to `fabric run` and dropped it in 2.5.1; lightning-sdk may install
a `lightning` of its own over ours. `mergekit-lit run` is the spelling that nothing can overwrite.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mergekit_lit.cli import COMMANDS, one_line
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit.preemption import exit_code

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_PRECISIONS = ("64-true", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_CRASHED = "A library has crashed: PYTHONFAULTHANDLER=1 shows where."
_ADVICE: Mapping[int, str] = {
    signal.SIGKILL: "If nobody sent it, memory ran out (`dmesg` tells): use fewer devices, or a "
    "smaller batch.",
    **dict.fromkeys((signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV), _CRASHED),
}
"""What to do about a process that a signal ended."""
_LIGHTNING_USAGE = (
    "usage: lightning run [model] [--devices N] SCRIPT|COMMAND ...  (other commands of `lightning` "
    "need lightning-sdk: pip install lightning-sdk)"
)


def run(argv: Sequence[str]) -> int:
    """Start a script or a command of ours in as many processes as there are devices.

    The processes learn of each other as under torchrun; scripts find the choice in LT_* (Fabric)
    and PL_TRAINER_* (a default Trainer), our commands through `lit.launch.trainer_arguments`.

    Raises:
        FileNotFoundError: the target is neither a file nor a command.
        ValueError: devices that are no devices.
    """
    options = _parser().parse_args(list(argv))
    target = _target(options.target, is_module=options.module)
    for name, value in _environment(options).items():
        os.environ[name] = value
    return _torchrun([*_placement(options), *target, *options.arguments])


def lightning_main(argv: Sequence[str] | None = None) -> int:
    """Answer `lightning run [model] ...`, and hand everything else to lightning-sdk."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"] and arguments[1:2] not in (["job"], ["mmt"]):
        rest = arguments[2:] if arguments[1:2] == ["model"] else arguments[1:]
        try:
            return run(rest)
        except SystemExit as request:
            return request.code if isinstance(request.code, int) else 2
        except (ValueError, OSError) as error:
            print(f"lightning run: error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("lightning run: interrupted", file=sys.stderr)
            return 130
    return _lightning_sdk()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mergekit-lit run",
        description="Start a script, or a command of mergekit-lit, in several processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", default="1", help="processes on this machine: 2, a list such as 0,1, or auto")
    add("--accelerator", choices=("auto", "cpu", "gpu", "cuda", "mps"), help="kind of device")
    add("--strategy", help="how the processes work together, such as ddp or fsdp; ddp by default")
    add("--precision", choices=_PRECISIONS, help="precision of the arithmetic; 32-true by default")
    add("--num-nodes", type=int, default=1, help="number of machines")
    add("--node-rank", type=int, default=0, help="which machine this is, from 0")
    add("--main-address", default="127.0.0.1", help="address of machine 0")
    add("--main-port", type=int, default=29400, help="free port of machine 0; for several machines")
    add("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    add("target", metavar="SCRIPT|COMMAND", help="a Python file, or train, evaluate, ...")
    add("arguments", nargs=argparse.REMAINDER, help="what the script or command gets")
    return parser


def _target(target: str, *, is_module: bool) -> list[str]:
    """Return torchrun's words for the target."""
    if is_module:
        return ["-m", target]
    if target in COMMANDS:
        return ["-m", "mergekit_lit", target]
    if not Path(target).is_file():
        raise FileNotFoundError(
            f"No script {target!r}. {unknown_name('command', target, COMMANDS)}"
        )
    return [target]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return LT_* as `fabric run` sets them, and PL_TRAINER_* for Trainers without arguments."""
    chosen = {
        "DEVICES": options.devices,
        "NUM_NODES": str(options.num_nodes),
        "ACCELERATOR": options.accelerator,
        "STRATEGY": options.strategy,
        "PRECISION": options.precision,
    }
    values = {name: value for name, value in chosen.items() if value is not None}
    prefixed = {f"LT_{name}": value for name, value in values.items()}
    prefixed |= {f"PL_TRAINER_{name}": value for name, value in values.items()}
    # One thread a process unless the user says otherwise: spinning threads slow each other down.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**prefixed, "LT_CLI_USED": "1", "OMP_NUM_THREADS": threads}


def _placement(options: argparse.Namespace) -> list[str]:
    """Return torchrun's flags; one machine needs no port of its own."""
    processes = f"--nproc_per_node={_processes(options.devices, options.accelerator)}"
    if options.num_nodes == 1:
        return ["--standalone", processes]
    return [
        processes,
        f"--nnodes={options.num_nodes}",
        f"--node_rank={options.node_rank}",
        f"--master_addr={options.main_address}",
        f"--master_port={options.main_port}",
    ]


def _processes(devices: str, accelerator: str | None) -> int:
    """Return how many processes `devices` asks for."""
    if devices in ("auto", "-1"):
        import torch

        return max(1, torch.cuda.device_count()) if accelerator != "cpu" else 1
    chosen = [part for part in devices.split(",") if part]
    if all(part.isdigit() for part in chosen) and chosen and devices != "0":
        return len(chosen) if "," in devices else int(devices)
    raise ValueError(
        f"`devices` must be a number from 1, a list such as 0,1, or auto, but is {devices!r}."
    )


def _torchrun(arguments: list[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What announces the end of a job's time is handed on too, from torch 2.9 on.
    if "--signals-to-handle" in torchrun.get_args_parser()._option_string_actions:
        arguments = [f"--signals-to-handle={_HANDED_ON}", *arguments]
    # The processes tell their own errors; the launcher's account of them would hide those.
    logging.disable(logging.ERROR)
    try:
        torchrun.main(arguments)
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as ended:
        # The processes were told of it, and tell it.
        return exit_code(int(ended.sigval))
    return 0


def _failed(error: "ChildFailedError") -> int:
    """Return the exit code of processes that have failed; tell of one that could not."""
    # When one has failed, torchrun ends the others by SIGTERM.
    ended = {r: f for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM}
    failures = ended or error.failures
    killed = {rank: each for rank, each in failures.items() if each.exitcode < 0}
    if not killed:
        return min(failures.values(), key=lambda each: each.timestamp).exitcode
    rank, failure = next(iter(killed.items()))
    number, name = -failure.exitcode, failure.signal_name()
    told = f"rank {rank} (process {failure.pid}) was ended by {name}. {_ADVICE.get(number, '')}"
    print(f"mergekit-lit run: error: {told.strip()}", file=sys.stderr)
    return exit_code(number)


def _lightning_sdk() -> int:
    """Run the `lightning` command of lightning-sdk, or say what we have."""
    try:
        scripts = metadata.distribution("lightning-sdk").entry_points
    except metadata.PackageNotFoundError:
        print(_LIGHTNING_USAGE, file=sys.stderr)
        return 2
    (command,) = scripts.select(group="console_scripts", name="lightning")
    code = command.load()()
    return code if isinstance(code, int) else 0
