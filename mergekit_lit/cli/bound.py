"""This file is `mergekit-lit bound`: experts and a merge in, every term of the bound out.

Like `merge` it is parsed in two passes: the second knows the flags of the method.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.calibration import calibration
from mergekit_lit.cli.method_flags import add_method, methods_named, recipe_of
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, instantiated, parse
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.merging.configuration import parameters
from mergekit_lit.stages.bounds import compare_bounds
from mergekit_lit.theory.effort import Effort

_USAGE = "EXPERT ... [--method NAME[,NAME ...] [flags of one]] [--data.suite SUITE] [options]"


# Each argument is one flag of the command line, hence so many.
def options(  # noqa: PLR0913
    experts: list[Path],
    *,
    method: Sequence[str] = ("average",),
    then: list[str | dict[str, Any]] | None = None,
    batch_norm: BatchNormPolicy = "base",
    seed: int = 0,
    base: str | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    refits: bool = False,
    out: Path | None = None,
    logger: LoggerKind = "csv",
    json: bool = False,
) -> None:
    """Tell what bounds the excess error of a merge.

    Args:
        experts: one file per expert, each of another task, all of one base.
        method: how to merge; `mergekit-lit methods` lists them. Several, such as
            `--method average,ties`, are compared, each with its defaults.
        then: veneers, such as `--then lines`.
        batch_norm: BatchNorm statistics of the merged model: `base`, `average`, `recalibrate` or
            `recalibrate-per-task`.
        seed: seed of methods that draw at random, and of the images for statistics.
        base: the base, if not the one that the first card names.
        include: patterns of the tensors to merge; all by default.
        exclude: patterns of the tensors that stay the base's.
        refits: whether to merge the refits that `StabilityTwins` exported beside the experts: the
            stability of any merge, linear or not. A method that looks at images or cards sees the
            same ones again: of its stability that is the part through the experts alone.
        out: folder of the records and of `report.html`, which compares them; or the record's file,
            ending in .json, for one method. Nothing is written without one.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with the terms as its summary, and as a table.
        json: whether to print the record as JSON; a list of them for several methods.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    functions = [MERGE_METHODS.get(name).function for name in methods_named(argv)]
    # Only of one method can the flags be told apart from those of others.
    own = functions if len(functions) == 1 else []
    flags = [flag for function in own for flag in parameters(function)]
    parser = _parser(own, flags)
    made = instantiated(parser, parse(parser, argv, positional="experts"))
    recipe = recipe_of(made, flags)
    records = compare_bounds(
        made.experts,
        [replace(recipe, method=name) for name in made.method],
        base=made.base,
        calibration=calibration(**vars(made.data)),
        effort=made.effort,
        refits=made.refits,
        out=made.out,
        logger=made.logger,
    )
    if made.json:
        told = [vars(record) for record in records]
        print_json(told[0] if len(told) == 1 else told)
    elif len(records) == 1:
        _print(records[0])
    else:
        _print_compared(records)
    return 0


def _parser(own: Sequence[Callable[..., Any]], flags: Sequence[str]) -> ArgumentParser:
    parser = command_parser("bound", COMMANDS["bound"], usage=_USAGE)
    add_parameters(parser, options, skip=set(flags) & {"seed"})
    for function in own:
        add_method(parser, function)
    parser.add_function_arguments(calibration, "data")
    parser.add_class_arguments(Effort, "effort")
    return parser


def _print(record: Record) -> None:
    """Print a table of experts, one of terms, and what does not hold."""
    found: Mapping[str, Any] = record.metrics["bound"]
    rows = record.metrics["experts"]
    known = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    print_table(rows, {key: key.replace("_", " ") for key in known})
    terms = [{**term, "value": _number(term)} for term in found["terms"].values()]
    print_table(terms, {"name": "term", "value": "value", "provenance": "from", "note": "note"})
    weighing = found["weighing"]
    print_table(
        [{"name": name, "value": weighing[name]} for name in _WEIGHING],
        {"name": "weighing", "value": "value"},
    )
    effective = " (effective: the data change the steps)" if found["effective"] else ""
    for name in _TOTALS:
        value = "unknown: a term of it is" if found[name] is None else f"{found[name]:.4g}"
        print(f"{name.replace('_', ' ')}: {value}{effective}")
    _print_sentences(record)


def _print_compared(records: Sequence[Record]) -> None:
    """Print one table, a column a method, and of each what does not hold."""
    told = {record.name: record.metrics["bound"] for record in records}
    rows: list[dict[str, Any]] = [
        {"name": term, **{name: _number(found["terms"][term]) for name, found in told.items()}}
        for term in records[0].metrics["bound"]["terms"]
    ]
    rows += [
        {"name": key.replace("_", " "), **{name: found[key] for name, found in told.items()}}
        for key in _TOTALS
    ]
    rows += [
        {"name": key, **{name: found["weighing"][key] for name, found in told.items()}}
        for key in _WEIGHING
    ]
    for key in ("train_loss", "test_loss", "gap"):
        means = {
            record.name: statistics.fmean(row[key] for row in record.metrics["experts"])
            for record in records
            if all(key in row for row in record.metrics["experts"])
        }
        rows += [{"name": f"mean {key.replace('_', ' ')}", **means}] if means else []
    print_table(rows, {"name": "", **{name: name for name in told}})
    for record in records:
        _print_sentences(record, f"{record.name}: ")


def _number(term: Mapping[str, Any]) -> Any:
    return term["provenance"] if term["value"] is None else term["value"]


def _print_sentences(record: Record, prefix: str = "") -> None:
    for sentence in record.metrics["bound"]["violated"]:
        print(f"{prefix}does not hold: {sentence}")
    for sentence in record.metrics["signatures"]:
        print(f"{prefix}signature: {sentence}")


_TOTALS = ("total", "total_by_step")
_WEIGHING = ("a_eff", "chi2_lambda", "chi2_w", "tv_lambda", "tv_w")
