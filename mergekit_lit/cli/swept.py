"""This file is what the jobs of sweeps share: a command at every point, each a run of its own."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mergekit_lit.cli.dotted import interpolated
from mergekit_lit.core.records import Record
from mergekit_lit.search.sweeping.axes import Point
from mergekit_lit.search.sweeping.jobs import Alike, Config, Cost

RECORDS = "*.record.json"
"""The records in a run's folder."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweptCommand:
    """A command as a sweep repeats it.

    Attributes:
        stage: name of the command.
        idle: keys that change no result, such as where it goes.
        given: what file and flags say, nested, without what is the sweep's own.
    """

    stage: ClassVar[str]
    idle: ClassVar[frozenset[str]]

    given: Mapping[str, Any]

    def kind(self, point: Mapping[str, Any]) -> Hashable:
        """Return None: a point decides its own values alone."""

    def followed(self, base: Config) -> Callable[[Point], Point]:
        """Return what tells a point's values together with those interpolated from them."""
        return interpolated(self.given, base, self.idle - {"seed"})

    def separate(self, config: Config) -> Sequence[Config]:
        """Return the configuration: it is one run."""
        return [config]

    def identity(self, config: Config) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        """Return all that decides the result, and no steps."""
        return {key: value for key, value in config.items() if key not in self.idle}, ()

    def alike(self, config: Config) -> Alike:  # noqa: ARG002 (all the same here)
        """Return that there are no steps to take together."""
        return Alike(obstacle=f"runs of {self.stage!r} have no steps")

    def on_gpu(self, config: Config) -> bool:
        """Return whether a run holds a GPU, as it does by default where there is one."""
        return torch.cuda.is_available() and config.get("trainer.accelerator") != "cpu"

    def trial(self, config: Config, folder: Path) -> Cost | None:
        """Return None: a part of a run tells little of the whole."""


def put_damaged_aside(folder: Path) -> None:
    """Put damaged records of a run aside, so that what they told is made anew; say so."""
    for path in sorted(folder.glob(RECORDS)):
        if Record.find(path) is None:
            path.replace(path.with_name(f"{path.name}.damaged"))
            _LOG.warning("%r is damaged: what it was the record of is made anew.", str(path))
