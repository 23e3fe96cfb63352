"""This file turns a launcher's environment into Trainer arguments, and asserts that both agree.

Lightning's Trainer never reads what `fabric run` says, and guesses one device under `torchrun` on a
CPU: the outcome would be two silent trainings of one rank each. Every Trainer of ours is therefore
made from `trainer_arguments(...)` and passed to `check_world_size`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

# Names of SLURM jobs that Lightning takes for a shell, in which it launches processes itself.
_SHELLS = ("bash", "interactive")


def trainer_arguments(
    explicit: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Return `explicit` with what the launcher decided: devices, nodes, strategy, precision ...

    `fabric run`, `lightning run` and `mergekit-lit run` speak through LT_* variables, torchrun
    through WORLD_SIZE and LOCAL_WORLD_SIZE, srun through SLURM_STEP_NUM_TASKS. Without a launcher,
    or in the shell of `srun --pty bash`, the arguments come back as they are.

    Args:
        explicit: Trainer arguments that the user gave; None and `auto` count as not given.
        environment: environment variables.

    Raises:
        ValueError: an explicit argument contradicts the launcher, or Lightning would overlook it.
    """
    arguments = dict(explicit)
    for name, launched in _launched(environment).items():
        given = arguments.get(name)
        if given in (None, "auto") or (name == "num_nodes" and given == 1):
            arguments[name] = launched
        elif not _same(name, given, launched):
            raise ValueError(
                f"`trainer.{name}` must agree with the launcher, which says {launched!r}, but is "
                f"{given!r}. Leave it out, or start the launcher with {given!r}."
            )
    return arguments


def check_world_size(trainer: Trainer, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a Trainer that would train beside the launcher's other processes, not with them.

    Raises:
        ValueError: the Trainer's world size is not the launcher's.
    """
    launched = _world(environment)
    world = int(environment.get("WORLD_SIZE", 0)) or (launched[0] if launched else 0)
    if world and trainer.world_size != world:
        raise ValueError(
            f"The Trainer's world size must be the launcher's {world}, but is "
            f"{trainer.world_size}: {world} separate trainings would run. Set `trainer.devices` "
            "and `trainer.num_nodes` to match, or leave both out."
        )


def _launched(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the Trainer arguments that the launcher fixes; empty without a launcher."""
    world = _world(environment)
    if world is None:
        return {}
    size, local = world
    arguments: dict[str, Any] = {"devices": local, "num_nodes": max(1, size // local)}
    if environment.get("LT_CLI_USED") == "1":
        if "," in environment.get("LT_DEVICES", ""):
            arguments["devices"] = environment["LT_DEVICES"]
        for name in ("accelerator", "strategy", "precision"):
            if environment.get(f"LT_{name.upper()}"):
                arguments[name] = environment[f"LT_{name.upper()}"]
    return arguments


def _world(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return (processes over all nodes, processes on this node), or None without a launcher."""
    if "WORLD_SIZE" in environment and "LOCAL_WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        tasks = int(environment["SLURM_STEP_NUM_TASKS"])
        job = environment.get("SLURM_JOB_NAME")
        if job in _SHELLS and tasks == 1:
            return None
        if job in _SHELLS:
            raise ValueError(
                f"A SLURM job of {tasks} tasks must not be named {job!r}, which Lightning takes "
                "for a shell. Rename it: srun --job-name=train ..."
            )
        return tasks, max(1, tasks // int(environment.get("SLURM_STEP_NUM_NODES", "1")))
    return None


def _same(name: str, given: Any, launched: Any) -> bool:
    if name == "devices":
        return _count(given) == _count(launched)
    if name == "strategy":
        # A strategy object, or a variant such as ddp_find_unused_parameters_true, is the user's.
        return not isinstance(given, str) or given.split("_")[0] == str(launched).split("_")[0]
    return str(given) == str(launched)


def _count(devices: Any) -> int:
    """Return how many devices a Trainer's `devices` names: 2, "2", "0,1" and [0, 1] are two."""
    if isinstance(devices, str):
        chosen = [part for part in devices.strip("[]").split(",") if part.strip()]
        return len(chosen) if "," in devices or devices.startswith("[") else int(devices)
    return len(devices) if isinstance(devices, Sequence) else int(devices)
