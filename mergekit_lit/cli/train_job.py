"""This file is `train` as a sweep repeats it: a run is a trajectory, with an expert at each K."""

import json
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli.dotted import interpolated, nested, refuse_idle, typed
from mergekit_lit.cli.parsing import instantiated, parse_mapping
from mergekit_lit.cli.train import tasks_of, train_made, train_parser
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import Start
from mergekit_lit.lit.optimization import Optimization
from mergekit_lit.search.sweeping.jobs import Config, Cost

# Where results go and how they are told: the sweep decides that, or it changes no result.
_NOT_IN_NAMES = {
    *("checkpoint_every", "jobs", "json", "logger", "name", "out", "resume", "seed"),
    *("data.download", "data.root"),
}
_COSTLY = (
    *("model.base", "model.image_size", "model.finetuning", "model.sam_radius", "data.batch"),
    "trainer.accumulate_grad_batches",
)
_TRIAL_STEPS = (2, 8)


@dataclass(frozen=True)
class TrainJob:
    """Trains one expert, or one at each of several K on the way.

    Attributes:
        given: what file and flags say, nested, without what is the sweep's own.
    """

    given: Mapping[str, Any]
    stage: str = "train"

    @property
    def metrics(self) -> Sequence[str]:
        """Losses and accuracies."""
        return ("train_loss", "train_accuracy", "val_loss", "val_accuracy")

    def kind(self, point: Mapping[str, Any]) -> Hashable:
        """Return what interpolations in the file refer to."""
        return interpolated(self.given, point)

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default."""
        refuse_idle(point, _NOT_IN_NAMES - {"seed"})
        return typed(_shared_parser(), self.given, {**point, "out": "."})

    def separate(self, config: Config) -> Sequence[Config]:
        """Return a configuration for each task that `data.task` names."""
        tasks = _tasks(config["data.suite"], config["data.task"], config["data.root"])
        # `seed` is short for the other.
        seed = config["model.seed"] if config["seed"] is None else config["seed"]
        return [{**config, "data.task": task, "model.seed": seed} for task in tasks]

    def identity(self, config: Config) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        """Return all that decides the path, and K; K is part of the path where the schedule asks.

        A warm-up that depends on K is told as the number of steps that it comes to.
        """
        steps = tuple(sorted(set(config["steps"])))
        names = ("optimizer", "lr", "momentum", "betas", "weight_decay", "schedule", "warmup_steps")
        given = {name: config[f"model.{name}"] for name in names}
        optimization = Optimization(**given)
        path = {key: value for key, value in config.items() if key not in _NOT_IN_NAMES}
        path["model.warmup_steps"] = optimization.warmup(steps[-1])
        if not optimization.horizon_matters:
            del path["steps"]
        return path, steps

    def is_done(self, folder: Path, steps: Sequence[int]) -> bool:
        """Return whether records name an expert of each K."""
        return set(steps) <= _steps_done(folder).keys()

    def execute(self, config: Config, folder: Path, steps: Sequence[int]) -> None:
        """Train to the K that are left, from the last checkpoint on if there is one."""
        left = sorted(set(steps) - _steps_done(folder).keys())
        name = _name(folder, config["data.task"], left)
        values = {**config, "steps": left, "out": str(folder), "resume": True}
        parser = _shared_parser()
        made = instantiated(parser, parse_mapping(parser, nested(values)))
        made.data.task_data = _loaded(_images(config))
        made.model.starts = _starts(_images(config))
        made.trainer.enable_progress_bar = False
        texts = {".yaml": yaml.safe_dump(nested(values), sort_keys=False)}
        train_made(made, texts, name=name)

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """Return what the card of each expert tells: how far it came, and how well it does."""
        told = ("task", "steps", *self.metrics)
        return [
            {**{name: card.get(name) for name in told}, "file": file}
            for _, (file, card) in sorted(_steps_done(folder).items())
        ]

    def cost_kind(self, config: Config) -> Hashable:
        """Return network, batch and kind of training."""
        return repr([config.get(key) for key in _COSTLY])

    def trial(self, config: Config, folder: Path) -> Cost:
        """Return what a run costs, by the difference of two trainings of a few steps."""
        on_gpu = torch.cuda.is_available() and config["trainer.accelerator"] != "cpu"
        clock = time.perf_counter if on_gpu else time.process_time
        given = {**config, "model.warmup_steps": 0, "logger": "csv", "checkpoint_every": 0}
        seconds: list[float] = []
        for steps in (_TRIAL_STEPS[0], *_TRIAL_STEPS):
            begun = clock()
            self.execute(given, folder / str(len(seconds)), [steps])
            seconds.append(clock() - begun)
        # The first loads what a worker keeps.
        _, few, many = seconds
        step = max(0.0, many - few) / (_TRIAL_STEPS[1] - _TRIAL_STEPS[0])
        size = sum(path.stat().st_size for path in (folder / "2").rglob("*") if path.is_file())
        return Cost(
            start_s=max(0.0, few - step * _TRIAL_STEPS[0]),
            step_s=step,
            result_bytes=size,
            on_gpu=on_gpu,
        )


def _steps_done(folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return file and card of each expert that is there and in a record, by K."""
    found = {}
    for path in sorted(folder.glob("*.record.json")):
        record = Record.read(path)
        if record.stage == "train":
            for file in filter(lambda name: (folder / name).is_file(), record.outputs):
                card = record.metrics["experts"][Path(file).stem]
                found[int(card["steps"])] = (file, card)
    return found


def _name(folder: Path, task: str, steps: Sequence[int]) -> str:
    """Return the stem of the files of a run, so that experts of all K can lie side by side."""
    if len(steps) == 1:
        return f"{task}-step{steps[0]}"
    return f"{task}-to{steps[-1]}" if (folder / f"{task}.record.json").is_file() else task


@lru_cache(maxsize=1)
def _shared_parser() -> ArgumentParser:
    return train_parser()


@lru_cache(maxsize=64)
def _tasks(suite: str, named: str, root: str | None) -> tuple[str, ...]:
    return tasks_of(suite, named, root=Path(root) if root else None)


@lru_cache(maxsize=4)
def _loaded(data: str) -> TaskData:
    """Return the images of a task, which a worker loads once; `data` is JSON of `--data.*`."""
    given = json.loads(data)
    root = given.pop("root")
    module = TaskDataModule(**given, root=Path(root) if root else None)
    module.setup()
    return module.task_data


@lru_cache(maxsize=4)
def _starts(data: str) -> dict[Hashable, Start]:  # noqa: ARG001 (of these images)
    """Return where the runs of a worker share what they begin with."""
    return {}


def _images(config: Config) -> str:
    """Return what decides the images of a run."""
    named = {key.removeprefix("data."): config[key] for key in config if key.startswith("data.")}
    return json.dumps({key: named[key] for key in named if key not in ("batch", "augment")})
