"""This file is the group `--trainer.*`: the arguments of Lightning's Trainer by its own names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

# What the stages decide, and what counts epochs or cuts data where we count steps and images.
_NOT_OURS = {
    "barebones",
    "default_root_dir",
    "enable_checkpointing",
    "fast_dev_run",
    "limit_test_batches",
    "limit_train_batches",
    "logger",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
}


def add_trainer(parser: ArgumentParser) -> None:
    """Make the Trainer's arguments flags of a command; the stage makes the Trainer.

    Null stands for what is not given, so that a value counts even if it is Lightning's default.
    """
    added = parser.add_class_arguments(
        Trainer, "trainer", instantiate=False, skip=_NOT_OURS, fail_untyped=False
    )
    for action in parser._actions:
        words = action.help or ""
        told = action.default is None or "Default: " in words
        if action.dest in added and not told:
            action.help = f"{words} Lightning's default: {action.default!r}."
    parser.set_defaults(dict.fromkeys(added))


def explicit(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[Callback]]:
    """Return the arguments that are given, and the callbacks apart."""
    given = {name: value for name, value in arguments.items() if value is not None}
    callbacks = given.pop("callbacks", [])
    return given, callbacks if isinstance(callbacks, list) else [callbacks]


@contextmanager
def misconfiguration_told() -> Iterator[None]:
    """Turn Lightning's own error about its arguments into a ValueError.

    Raises:
        ValueError: Lightning refused an argument.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(f"Lightning refuses the arguments of its Trainer: {error}") from error
