"""This file is `mergekit-lit evaluate`: scores of base, experts and merged models on a suite."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import is_first_process, print_json, print_table
from mergekit_lit.cli.parsing import add_group, add_parameters, command_parser, instantiated, parse
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.cli.trainer import add_trainer, explicit, misconfiguration_told
from mergekit_lit.core.records import Record
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.stages.evaluate import evaluate_files

_USAGE = "MODEL ... [--data.suite SUITE] [--data.split test] [--out FOLDER] [options]"


def options(*, json: bool = False) -> None:
    """Say how the result is told.

    Args:
        json: whether to print the record as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = evaluate_parser()
    namespace = parse(parser, argv, positional="models")
    texts = config_texts(parser, argv, namespace, positional="models")
    made = vars(instantiated(parser, namespace))
    json = made.pop("json")
    record = evaluated(made)
    if is_first_process():
        if made["out"] is not None:
            write_config(texts, Path(made["out"]) / f"{record.name}.config")
        if json:
            print_json(vars(record))
        else:
            _print(record)
    return 0


def evaluated(made: dict[str, Any]) -> Record:
    """Evaluate as the arguments of `evaluate_files` say, and return the record."""
    trainer, callbacks = explicit(vars(made.pop("trainer")))
    with misconfiguration_told():
        return evaluate_files(**made, callbacks=callbacks, trainer=trainer)


def evaluate_parser() -> ArgumentParser:
    """Return the parser of `evaluate`."""
    parser = command_parser("evaluate", COMMANDS["evaluate"], usage=_USAGE)
    add_parameters(parser, evaluate_files, skip={"data", "trainer", "callbacks"})
    add_group(parser, MergeDataModule, "data")
    add_trainer(parser)
    add_parameters(parser, options)
    return parser


def _print(record: Record) -> None:
    models: Mapping[str, Any] = record.metrics["models"]
    tasks = list(dict.fromkeys(task for told in models.values() for task in told["tasks"]))
    rows = []
    for name, told in models.items():
        accuracies = {task: told["tasks"].get(task, {}).get("accuracy") for task in tasks}
        rows.append({"model": name, **accuracies, "mean": told["mean"]["accuracy"]})
    print_table(rows, {name: name for name in ("model", *tasks, "mean")})
    for warning in record.metrics["warnings"]:
        print(f"warning: {warning}")
