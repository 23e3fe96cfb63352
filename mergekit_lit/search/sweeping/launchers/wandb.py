"""This file runs a sweep by agents of W&B, each of which starts our command for run after run.

W&B is given a grid over one parameter, `run`, whose values are the names of the runs that are left.
What a name stands for only the sweep's folder says, and its claims keep two from doing the same
run: agents may be started, stopped and added anywhere that this folder can be reached from, by the
same path and in the same working folder.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mergekit_lit.core.files import write_text
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit.wandb_runs import prepare, project, wandb_key
from mergekit_lit.search.sweeping.watching import watch
from mergekit_lit.search.sweeping.worker import Listen, Sweep
from mergekit_lit.stages.folders import SWEEP_FILE

FILE = "wandb_sweep.yaml"
"""What W&B is given, in the sweep's folder."""

_OPTIONS = ("entity", "project")
# A training that is told to end makes a checkpoint first.
_LEAVE_S = 60.0


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that W&B's sweeps do not take.

    Raises:
        ValueError: names the first of them.
    """
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(unknown_name("launcher option of 'wandb'", name, _OPTIONS))


def sweep_definition(sweep: Sweep) -> dict[str, Any]:
    """Return what W&B is given: a grid over the runs that are left, and the command for one."""
    left = [run.name for run in sweep.plan.runs if not sweep.is_done(run)]
    ours = ["mergekit-lit", "sweep", str(sweep.out / SWEEP_FILE), f"--out={sweep.out}"]
    return {
        "name": sweep.out.name,
        "method": "grid",
        "program": "mergekit-lit",
        "command": ["${env}", *ours, "--logger=wandb", "${args}"],
        "parameters": {"run": {"values": left}},
    }


def write_definition(sweep: Sweep, options: Mapping[str, Any]) -> None:
    """Write what W&B is given, and see to it that it can be given.

    Args:
        sweep: what to do.
        options: `entity` and `project` of the sweep, by default the user's and ours.

    Raises:
        ValueError: W&B is offline, or has no key; the file is written by then.
    """
    path, definition = sweep.out / FILE, sweep_definition(sweep)
    where = {"project": project(), **options}
    write_text(path, yaml.safe_dump({**where, **definition}, sort_keys=False))
    if _left(definition):
        _check_online(path)


def run_wandb(sweep: Sweep, listen: Listen, *, jobs: int, options: Mapping[str, Any]) -> None:
    """Run a sweep by agents on this machine, and wait for them.

    Args:
        sweep: what to do.
        listen: is told of each run that is done, or has failed.
        jobs: number of agents, at least 1.
        options: as of `write_definition`.

    Raises:
        ValueError: W&B refuses the sweep.
    """
    definition = sweep_definition(sweep)
    if not _left(definition):
        return
    name = _registered(definition, {"project": project(), **options})
    agents = _agents(name, sweep.out, jobs, len(sweep.plan.runs))
    try:
        watch(sweep, listen, lambda: all(agent.poll() is not None for agent in agents))
    except BaseException:
        _end(agents)
        raise


def _left(definition: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of the runs in a definition: W&B refuses a grid without a point."""
    names: list[str] = definition["parameters"]["run"]["values"]
    return names


def _check_online(path: Path) -> None:
    """Refuse to go on without a server; the user may have one elsewhere."""
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if offline or not wandb_key():
        lack = "WANDB_MODE says otherwise" if offline else "there is no API key (`wandb login`)"
        raise ValueError(
            f"The launcher 'wandb' must reach W&B's server, but {lack}. Where it can be reached, "
            f"run `wandb sweep {path}` and then `wandb agent SWEEP_ID`, once for each worker, in "
            "this folder."
        )
    prepare(online=True)


def _registered(definition: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """Return the name by which agents know the sweep."""
    import wandb

    try:
        name = wandb.sweep(dict(definition), **where)
    # Whatever keeps the server from taking it, W&B has many classes for.
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(f"W&B must take the sweep, but does not: {told}") from None
    return "/".join([*(where[part] for part in _OPTIONS if part in where), name])


def _agents(name: str, folder: Path, jobs: int, runs: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", name]
    environment = {
        **os.environ,
        "WANDB_DIR": str(folder),
        # A run that fails must not end the sweep.
        "WANDB_AGENT_DISABLE_FLAPPING": "true",
        "WANDB_AGENT_MAX_INITIAL_FAILURES": str(runs + 1),
    }
    return [subprocess.Popen(command, env=environment) for _ in range(jobs)]


def _end(agents: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the agents' runs leave, and end what does not."""
    for agent in agents:
        agent.terminate()
    for agent in agents:
        with suppress(subprocess.TimeoutExpired):
            agent.wait(_LEAVE_S)
        agent.kill()
