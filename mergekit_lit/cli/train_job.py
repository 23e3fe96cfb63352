"""This file is `train` as a sweep repeats it: a run is a trajectory, with an expert at each K."""

import json
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli.dotted import nested, refuse_idle, typed
from mergekit_lit.cli.parsing import instantiated, parse_mapping
from mergekit_lit.cli.swept import RECORDS, SweptCommand, put_damaged_aside
from mergekit_lit.cli.train import tasks_of, train_made, train_parser
from mergekit_lit.core.files import has_content
from mergekit_lit.core.records import Record
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import Start
from mergekit_lit.lit.lockstep import Pace, Together, in_lockstep
from mergekit_lit.lit.optimization import Optimization
from mergekit_lit.search.sweeping.jobs import Alike, Config, Cost, Task

# Where results go and how they are told: the sweep decides that, or it changes no result.
_IDLE = frozenset(
    {
        *("checkpoint_every", "jobs", "json", "logger", "name", "out", "resume", "seed"),
        *("data.download", "data.root"),
    }
)
_COSTLY = (
    *("model.base", "model.image_size", "model.finetuning", "model.sam_radius", "data.batch"),
    "model.teacher",
    "trainer.accumulate_grad_batches",
)
_TRIAL_STEPS = (2, 8)
# What runs of one crew may differ in: none of it changes what a pass computes.
_OWN = _IDLE | {
    *("model.optimizer", "model.lr", "model.momentum", "model.betas", "model.weight_decay"),
    *("model.schedule", "model.warmup_steps", "model.seed"),
    *("data.n", "data.train_share", "data.split_seed", "data.neighbour", "data.neighbour_seed"),
}
# What keeps a run from being stacked, unless it has this value.
_STACKED = {
    "logger": "csv",
    "model.finetuning": "full",
    "model.sam_radius": 0.0,
    "model.compile": False,
    "model.channels_last": False,
    "model.teacher": None,
}
# Arguments of the Trainer that do not.
_STACKED_TRAINER = {
    *("accelerator", "accumulate_grad_batches", "gradient_clip_algorithm", "gradient_clip_val"),
    *("enable_model_summary", "enable_progress_bar", "log_every_n_steps"),
}
# On a processor one pass for all was faster up to about so many samples each.
_TINY_BATCH = 8


@dataclass(frozen=True)
class TrainJob(SweptCommand):
    """Trains one expert, or one at each of several K on the way."""

    stage = "train"
    idle = _IDLE

    @property
    def metrics(self) -> Sequence[str]:
        """Losses and accuracies."""
        return ("train_loss", "train_accuracy", "val_loss", "val_accuracy")

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default."""
        refuse_idle(point, self.idle - {"seed"})
        if "model.seed" in point and {**self.given, **point}.get("seed") is not None:
            raise ValueError(
                "`seed` must be left out beside the axis `model.seed`, for which it is short."
            )
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
        _check_counts(config)
        names = ("optimizer", "lr", "momentum", "betas", "weight_decay", "schedule", "warmup_steps")
        given = {name: config[f"model.{name}"] for name in names}
        optimization = Optimization(**given)
        path, _ = super().identity(config)
        path = {**path, "model.warmup_steps": optimization.warmup(steps[-1])}
        if not optimization.horizon_matters:
            del path["steps"]
        return path, steps

    def is_done(self, folder: Path, steps: Sequence[int]) -> bool:
        """Return whether records name an expert of each K."""
        return set(steps) <= _steps_done(folder).keys()

    def execute(self, config: Config, folder: Path, steps: Sequence[int]) -> None:
        """Train to the K that are left, from the last checkpoint on if there is one."""
        _train(config, folder, steps)

    def alike(self, config: Config) -> Alike:
        """Return that runs which differ in numbers of their own alone share their passes."""
        obstacle = _obstacle(config)
        if obstacle:
            return Alike(obstacle=obstacle)
        on_gpu = self.on_gpu(config)
        return Alike(
            kind=json.dumps({key: config[key] for key in sorted(config.keys() - _OWN)}),
            execute=_train_together,
            may_pay=on_gpu or config["data.batch"] <= _TINY_BATCH,
            on_gpu=on_gpu,
        )

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
        on_gpu = self.on_gpu(config)
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


def _check_counts(config: Config) -> None:
    """Refuse, before any run is made, numbers that none could train with.

    Raises:
        ValueError: a number of steps, or a batch, that is none.
    """
    for key, numbers in (("steps", config["steps"]), ("data.batch", [config["data.batch"]])):
        if not numbers or min(numbers) < 1:
            told = numbers if key == "steps" else numbers[0]
            raise ValueError(f"`{key}` must be at least 1, but is {told!r}.")


def _train(
    config: Config, folder: Path, steps: Sequence[int], together: Together | None = None
) -> None:
    """Train to the K that are left, from the last checkpoint on if there is one."""
    put_damaged_aside(folder)
    left = sorted(set(steps) - _steps_done(folder).keys())
    name = _name(folder, config["data.task"], left)
    values = {**config, "steps": left, "out": str(folder), "resume": True}
    if together is not None:
        # Lightning would take all GPUs, for each of the runs.
        values["trainer.devices"] = 1
    parser = _shared_parser()
    made = instantiated(parser, parse_mapping(parser, nested(values)))
    made.data.task_data = _loaded(_images(config))
    made.model.starts = _starts(_images(config))
    made.model.together = together
    made.trainer.enable_progress_bar = False
    texts = {".yaml": yaml.safe_dump(nested(values), sort_keys=False)}
    train_made(made, texts, name=name)


def _train_together(tasks: Sequence[Task], pace: Pace) -> list[Exception | None]:
    """Train several experts at once; each record tells its share of the time."""
    before = {path for _, folder, _ in tasks for path in folder.glob(RECORDS)}
    errors = in_lockstep([partial(_train, *task) for task in tasks], pace)
    for path in {path for _, folder, _ in tasks for path in folder.glob(RECORDS)} - before:
        record = Record.read(path)
        record.seconds, record.cpu_seconds = (
            round(seconds / len(tasks), 3) for seconds in (record.seconds, record.cpu_seconds)
        )
        record.metrics["lockstep"] = {"runs": len(tasks), "one_pass": bool(pace.together)}
        record.write(path)
    return errors


def _obstacle(config: Config) -> str:
    """Return why a run cannot share its passes; empty if it can."""
    trainer = {key: config[key] for key in config if key.startswith("trainer.")}
    given = {key for key, value in trainer.items() if value is not None}
    others = sorted(given - {f"trainer.{name}" for name in _STACKED_TRAINER})
    others += [key for key, value in _STACKED.items() if config[key] != value]
    return f"`{others[0]}` is {config[others[0]]!r}" if others else ""


def _steps_done(folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return file and card of each expert that is there and in a sound record, by K."""
    found = {}
    for path in sorted(folder.glob(RECORDS)):
        record = Record.find(path)
        if record and record.stage == "train":
            for file in filter(lambda name: has_content(folder / name), record.outputs):
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
