"""This file is `mergekit-lit doctor`: what is broken here, and how to mend each thing.

A check returns rows of `area`, `what`, `status` (`ok`, `warning`, `broken`) and `mend`.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from packaging.requirements import Requirement

from mergekit_lit.cli import COMMANDS, one_line
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse

Row: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["ok", "warning", "broken"]

# GHSA-w37p-236h-pfx3: these two releases stole credentials when imported.
_MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
_DISK_GB = 2.0


def doctor(
    *,
    suite: list[str] | None = None,
    tasks: list[str] | None = None,
    root: Path | None = None,
    download: bool = False,
    json: bool = False,
) -> bool:
    """Check data, versions, devices, disk and W&B; return whether nothing is broken.

    Args:
        suite: suites, or folders of your own tasks, whose data are checked; null for embedded8.
        tasks: names of the tasks of these suites to check; null for all.
        root: folder of the downloaded data sets; null for the default one.
        download: whether to fetch data sets that are not there, or not whole.
        json: whether to print JSON.
    """
    rows = [*check_versions(), *check_devices(), *check_disk(Path.cwd()), *check_wandb()]
    rows += check_commands()
    for name in suite or ["embedded8"]:
        # Loaders tell what they fetch, which must not stand in what a program reads.
        with redirect_stdout(sys.stderr):
            rows += check_suite(name, tasks=tasks, root=root, download=download)
    whole = all(row["status"] != "broken" for row in rows)
    if json:
        print_json({"ok": whole, "checks": rows})
        return whole
    print_table(rows, {"area": "area", "status": "status", "what": "what", "mend": "mend"})
    print("Nothing is broken." if whole else "Something is broken: see `mend` above.")
    return whole


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if something is broken."""
    parser = command_parser("doctor", COMMANDS["doctor"], usage="[SUITE ...] [options]")
    add_parameters(parser, doctor)
    return 0 if doctor(**vars(parse(parser, argv, positional="suite"))) else 1


def check_versions() -> Iterator[Row]:
    """Yield one row for Python and one for each package that we require."""
    python = ".".join(map(str, sys.version_info[:3]))
    status: Status = "ok" if sys.version_info >= (3, 11) else "broken"
    yield _row("versions", status, f"python {python}", "install Python 3.11 or newer")
    for text in metadata.requires("mergekit-lit") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version_row(requirement)


def _version_row(requirement: Requirement) -> Row:
    name = requirement.name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _row("versions", "broken", f"{name} is missing", f"pip install '{requirement}'")
    if version in _MALICIOUS.get(name, ()):
        return _row(
            "versions",
            "broken",
            f"{name} {version} is a malicious release that steals credentials",
            "pip install -U lightning pytorch-lightning; then change every password and key that "
            "this machine holds",
        )
    if requirement.specifier.contains(version, prereleases=True):
        return _row("versions", "ok", f"{name} {version}")
    what = f"{name} {version}, but {requirement.specifier} is needed"
    return _row("versions", "broken", what, f"pip install -U '{requirement}'")


def check_devices() -> Iterator[Row]:
    """Yield what there is to compute on."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    yield _row("devices", "ok", f"{os.cpu_count()} processors, OMP_NUM_THREADS {threads}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 1e9:.0f} GB"
        yield _row("devices", "ok", f"cuda:{index} {found.name}, {size}")
    if torch.backends.mps.is_available():
        yield _row("devices", "ok", "mps (Apple)")
    if torch.version.cuda and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield _row(
            "devices",
            "warning",
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU",
            "update the NVIDIA driver, or install the torch build of its CUDA version",
        )


def check_disk(folder: Path) -> Iterator[Row]:
    """Yield whether results can be written to a folder, and the space left there."""
    free = shutil.disk_usage(folder).free / 1e9
    status: Status = "ok" if free >= _DISK_GB else "warning"
    yield _row("disk", status, f"{free:.1f} GB free in {folder}", "delete old run folders")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        mend = "run in a folder of yours"
        yield _row("disk", "broken", f"cannot write in {folder}: {one_line(error)}", mend)


def check_wandb() -> Iterator[Row]:
    """Yield W&B's state. It is never needed, so that it is never broken."""
    from mergekit_lit.lit.wandb_runs import wandb_key

    if find_spec("wandb") is None:
        yield _row("wandb", "warning", "not installed", "pip install wandb, if you want it")
        return
    key = wandb_key()
    mode = os.environ.get("WANDB_MODE", "unset")
    state = "API key found" if key else "no API key: offline only, later `wandb sync`"
    what = f"wandb {metadata.version('wandb')}, {state}, WANDB_MODE {mode!r}"
    wrong = mode == "" or (mode == "online" and not key)
    mend = "`wandb login`, or export WANDB_MODE=offline"
    yield _row("wandb", "warning" if wrong else "ok", what, mend)


def check_commands() -> Iterator[Row]:
    """Yield whether `lightning` is our command: lightning-sdk overwrites it without a word."""
    path = shutil.which("lightning")
    if path is not None and b"mergekit_lit" in Path(path).read_bytes():
        yield _row("commands", "ok", "`lightning run` is ours")
        return
    mend = "`mergekit-lit run` does the same; or pip install --force-reinstall mergekit-lit"
    what = f"{path} is not ours" if path else "there is no `lightning` on PATH"
    yield _row("commands", "warning", what, mend)


def check_suite(
    name: str, *, tasks: Sequence[str] | None, root: Path | None, download: bool
) -> Iterator[Row]:
    """Yield the state of a suite's data: counts, hashes, leaks."""
    from mergekit_lit.data.listing import check_data

    for row in check_data(name, tasks=tasks, root=root, download=download):
        yield {"area": f"data {name}", **row}


def _row(area: str, status: Status, what: str, mend: str = "") -> Row:
    return {"area": area, "status": status, "what": what, "mend": "" if status == "ok" else mend}
