"""This file is the jobs that a sweep can repeat: how each one's configuration is read and done."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli.parsing import instantiated, parse_mapping
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.cli.train import tasks_of, train_made, train_parser
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import Start
from mergekit_lit.lit.optimization import Optimization
from mergekit_lit.search.sweeping.jobs import Config

# Where results go and how they are told: the sweep decides that, or it changes no result.
_NOT_IN_NAMES = {
    *("checkpoint_every", "jobs", "json", "logger", "name", "out", "resume", "seed"),
    *("data.download", "data.root"),
}
# Groups of parameters of all jobs; the values of other keys may be mappings of their own.
_GROUPS = ("data", "model", "trainer")


@dataclass(frozen=True)
class TrainJob:
    """`train` as a sweep repeats it: a run is one trajectory of one task, with an expert a K.

    Attributes:
        given: what file and flags say, nested, without what is the sweep's own.
    """

    given: Mapping[str, Any]
    stage: str = "train"

    def kind(self, point: Mapping[str, Any]) -> Hashable:
        """Return None: all runs have the same keys."""

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default."""
        values = merged_values(dict(self.given), {**nested(point), "out": "."})
        config = flat(_plain(_shared_parser(), values))
        if config["seed"] is not None:
            config["model.seed"] = config["seed"]
        return config

    def separate(self, config: Config) -> Sequence[Config]:
        """Return a configuration for each task that `data.task` names."""
        tasks = _tasks(config["data.suite"], config["data.task"], config["data.root"])
        return [{**config, "data.task": task} for task in tasks]

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
        told = ("task", "steps", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
        return [
            {**{name: card.get(name) for name in told}, "file": file}
            for _, (file, card) in sorted(_steps_done(folder).items())
        ]


def flat(values: Mapping[str, Any]) -> Config:
    """Return nested values by dotted key; only groups of parameters are taken apart."""
    config: Config = {}
    for key, value in values.items():
        if key in _GROUPS and isinstance(value, dict):
            config |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            config[key] = value
    return config


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as a file of parameters nests them."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        inner = whole
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return whole


def _plain(parser: ArgumentParser, values: dict[str, Any]) -> dict[str, Any]:
    """Return typed values as YAML has them."""
    namespace = parse_mapping(parser, values)
    plain: dict[str, Any] = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    return plain


def _steps_done(folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return file and card of each expert that a record of the folder names, by K."""
    found = {}
    for path in sorted(folder.glob("*.record.json")):
        record = Record.read(path)
        if record.stage == "train":
            for file in record.outputs:
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
