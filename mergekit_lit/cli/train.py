"""This file is `mergekit-lit train`: one expert, or one a task, in turn or side by side."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import is_first_process, print_json, print_table
from mergekit_lit.cli.parsing import add_group, add_parameters, command_parser, instantiated, parse
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.cli.trainer import add_trainer, explicit, misconfiguration_told
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.launch import trainer_arguments
from mergekit_lit.lit.preemption import leave_if_told, preemptible
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.train import train_expert, world_size

_GIVEN_APART = {"data", "model", "trainer", "callbacks", "loggers", "name"}


class SaveConfig(Callback):
    """Writes the configuration when training really starts, so that bad input leaves no files."""

    def __init__(self, texts: dict[str, str], stem: Path) -> None:
        self._texts, self._stem = texts, stem

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write both files."""
        if trainer.is_global_zero:
            write_config(self._texts, self._stem)


def options(
    *, seed: int | None = None, logger: LoggerKind = "csv", jobs: int = 1, json: bool = False
) -> None:
    """Say how the run is made.

    Args:
        seed: short for `model.seed`: the seed of data order, augmentation and dropout.
        logger: `csv` (with JSON lines, always written), `tensorboard`, `wandb` (offline) or
            `wandb-online`.
        jobs: processes that train tasks side by side, with one thread each, at least 1.
        json: whether to print the cards as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = train_parser()
    namespace = parse(parser, argv)
    _check_jobs(namespace)
    tasks = tasks_of(namespace.data.suite, namespace.data.task, root=namespace.data.root)
    if namespace.model.teacher is not None and len(tasks) > 1:
        raise ValueError(
            f"`data.task` must be one task with `model.teacher`, an expert of one, but names "
            f"{len(tasks)}: {', '.join(tasks)}. Train them one by one."
        )
    texts = config_texts(parser, argv, namespace)
    again = "The same command" + ("" if namespace.resume else " with --resume true") + " goes on."
    with preemptible(again):
        if namespace.jobs > 1 and len(tasks) > 1:
            files = _side_by_side(argv, tasks, texts, jobs=min(namespace.jobs, len(tasks)))
        else:
            files = [file for task in tasks for file in _train_one(parser, namespace, task, texts)]
    if is_first_process():
        _print_cards(files, json=namespace.json)
    return 0


def train_parser() -> ArgumentParser:
    """Return the parser of `train`."""
    parser = command_parser("train", COMMANDS["train"], usage="--out FOLDER --steps K [options]")
    task = "a task of the suite, several after commas (mnist,letters), or `all`, one expert each."
    add_group(parser, TaskDataModule, "data", task=task)
    add_group(parser, ExpertModule, "model")
    add_trainer(parser)
    add_parameters(parser, train_expert, skip=_GIVEN_APART)
    add_parameters(parser, options)
    return parser


def _check_jobs(namespace: Namespace) -> None:
    """Refuse a number of jobs below 1, and jobs that would each be several processes."""
    if namespace.jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, but is {namespace.jobs}.")
    if namespace.jobs == 1:
        return
    given, _ = explicit(vars(namespace.trainer))
    processes = world_size(trainer_arguments(given))
    if trainer_arguments({}) or processes > 1:
        raise ValueError(
            f"`jobs` must be 1 where a launcher or `trainer.devices` makes {processes} processes "
            f"of one training, but is {namespace.jobs}. Train tasks side by side, or one task in "
            "several processes."
        )


def tasks_of(suite_name: str, named: str, *, root: Path | None = None) -> tuple[str, ...]:
    """Return the tasks that `data.task` names: one, several after commas, or `all`."""
    suite = load_suite(suite_name, root=root)
    return suite.chosen(None if named == "all" else _split(named, suite.names))


def _split(text: str, known: Sequence[str]) -> list[str]:
    """Return the names between the commas of `text`; of names that hold commas, the longest."""
    parts, names = text.split(","), []
    while parts:
        sizes = range(len(parts), 0, -1)
        size = next((n for n in sizes if ",".join(parts[:n]).strip() in known), 1)
        names.append(",".join(parts[:size]).strip())
        parts = parts[size:]
    return names


def _train_one(
    parser: ArgumentParser, namespace: Namespace, task: str, texts: dict[str, str]
) -> list[Path]:
    """Train one task's expert, or experts, and return the files."""
    leave_if_told()
    chosen = namespace.clone()
    chosen.data.task = task
    if chosen.seed is not None:
        chosen.model.seed = chosen.seed
    return train_made(instantiated(parser, chosen), texts)


def train_made(made: Namespace, texts: dict[str, str], **changed: Any) -> list[Path]:
    """Train the expert, or experts, that objects describe, and return the files.

    Args:
        made: what the parser made of the flags.
        texts: the configuration, to be saved with the run.
        changed: other values for arguments of `train_expert`.
    """
    trainer, callbacks = explicit(vars(made.trainer))
    # A bar is for people; it would fill a log file.
    trainer.setdefault("enable_progress_bar", sys.stderr.isatty() and made.jobs == 1)
    stage = {key: made[key] for key in inspect.signature(train_expert).parameters if key in made}
    stage |= {
        "trainer": trainer,
        "callbacks": [*callbacks, SaveConfig(texts, Path(made.out) / "config")],
        "loggers": made.logger,
        **changed,
    }
    with misconfiguration_told():
        return list(train_expert(**stage).experts)


def _side_by_side(
    argv: Sequence[str], tasks: Sequence[str], texts: dict[str, str], *, jobs: int
) -> list[Path]:
    """Train the tasks in a few processes; the first error ends them."""
    with Crew(jobs) as crew:
        runs = crew.run(_train_in_worker, [(list(argv), task, texts) for task in tasks])
    return [file for files in runs for file in files]


def _train_in_worker(job: tuple[list[str], str, dict[str, str]]) -> list[Path]:
    argv, task, texts = job
    parser = train_parser()
    return _train_one(parser, parse(parser, argv), task, texts)


def _print_cards(files: Sequence[Path], *, json: bool) -> None:
    cards = [{"file": str(file), **load_expert(file).card.to_json()} for file in files]
    if json:
        print_json(cards)
        return
    headings = {"task": "task", "steps": "steps", "train_loss": "train loss"}
    headings |= {"val_loss": "val loss", "val_accuracy": "val accuracy", "file": "file"}
    print_table(cards, headings)
