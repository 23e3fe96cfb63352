"""This file is the log of a search: one line a trial, so that a killed search goes on."""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mergekit_lit.core.files import append_text, write_text
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.records import plain
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.search.tuning.objective import Answers

State = Literal["scored", "discarded", "failed"]
"""Scored on all images; out before that; or no model at all, as where numbers overflow."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was found of one configuration.

    Attributes:
        method: name of the merge method.
        number: place among the method's trials, from 0.
        config: values of the searched parameters.
        batch_norm: where its BatchNorm statistics come from.
        state: how far it came.
        value: the objective on val; estimated where it is discarded, None where it failed.
        upper: upper end of the interval of an estimate.
        by_task: value of each task.
        images: validation images that it was scored on.
        seconds: wall time of merging, statistics and scores.
        cpu_seconds: processor time of the same.
        note: why it failed, or which trial it repeats.
        again: whether it was discarded, and scored on all images for the regret's sake alone.
        answers: its answers to all images (float32, base64), if it was the best so far.
    """

    method: str
    number: int
    config: Mapping[str, Any]
    batch_norm: BatchNormPolicy = "recalibrate-per-task"
    state: State
    value: float | None = None
    upper: float | None = None
    by_task: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    note: str = ""
    again: bool = False
    answers: Mapping[str, str] = field(default_factory=dict)


class TrialLog:
    """The trials of one folder, each on disk as soon as it is done.

    A line is on the disk before the next trial begins; a line that a crash cut short is dropped.

    Attributes:
        trials: every trial, in the order in which they were made.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open the log; without a file there is none before the first trial.

        Args:
            path: the file; its first line holds the facts, every other one a trial.
            facts: what the values of trials depend on, as JSON.

        Raises:
            ValueError: the file is the log of another search, or of none; it is left as it is.
        """
        self._path = path
        self._facts = json.loads(json.dumps(plain(facts)))
        self.trials = self._read() if path.is_file() else []

    def add(self, trial: Trial) -> None:
        """Write a trial."""
        line = json.dumps(plain(asdict(trial))) + "\n"
        if not self._path.is_file():
            write_text(self._path, json.dumps({"search": self._facts}) + "\n")
        append_text(self._path, line, durable=True)
        self.trials.append(trial)

    @property
    def own(self) -> list[Trial]:
        """The trials that the search itself made."""
        return [trial for trial in self.trials if not trial.again]

    def of(self, method: str) -> list[Trial]:
        """Return those of one method."""
        return [trial for trial in self.own if trial.method == method]

    def again(self, method: str) -> list[Trial]:
        """Return the trials of one method that were made for the regret's sake."""
        return [trial for trial in self.trials if trial.method == method and trial.again]

    def _read(self) -> list[Trial]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *lines = map(json.loads, whole.splitlines())
            found = head["search"]
            trials = [Trial(**line) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(self._path)!r} must be the log of a search, but is not: {error!r}. "
                "Choose another folder."
            ) from None
        self._check_same(found)
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return trials

    def _check_same(self, found: Mapping[str, Any]) -> None:
        for name, mine in self._facts.items():
            if found.get(name) != mine:
                raise ValueError(
                    f"`out` must be a new folder or that of this very search, but the search of "
                    f"{str(self._path)!r} had {_told(name, found.get(name))} and this one has "
                    f"{_told(name, mine)}. Choose another folder."
                )


def best_of(trials: Sequence[Trial], state: State = "scored") -> Trial | None:
    """Return the trial of a state with the best value; of equal ones the shortest step.

    Of those the first; None if there is none.
    """
    scored = [trial for trial in trials if trial.state == state and trial.value is not None]
    return min(
        scored,
        key=lambda trial: (-(trial.value or 0.0), _length(trial.config)),
        default=None,
    )


def _length(config: Mapping[str, Any]) -> float:
    """Return the scale of a step; 0 where there is none, or one for each pattern of tensors."""
    scale = config.get(SCALE)
    return float(scale) if isinstance(scale, int | float) else 0.0


def pack_answers(answers: Answers) -> dict[str, str]:
    """Return per-image numbers as text, exact in float32."""
    return {
        task: base64.b64encode(each.float().numpy().astype("<f4").tobytes()).decode("ascii")
        for task, each in answers.items()
    }


def unpack_answers(packed: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return what `pack_answers` took."""
    return {
        task: torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
        for task, text in packed.items()
    }


def _told(name: str, value: Any) -> str:
    text = json.dumps(value)
    return f"{name} {text}" if len(text) <= 60 else f"other {name}"
