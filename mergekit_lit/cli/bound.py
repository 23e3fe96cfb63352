"""This file is `mergekit-lit bound`: experts and a merge in, every term of the bound out.

Like `merge` it is parsed in two passes: the second knows the flags of the method.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.merge import add_method, calibration, method_named, recipe_of
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, instantiated, parse
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import parameters
from mergekit_lit.stages.bound import bound_files
from mergekit_lit.theory.constants import Effort

_USAGE = "EXPERT ... [--method NAME [its flags]] [--data.suite SUITE] [options]"


# Each argument is one flag of the command line, hence so many.
def options(  # noqa: PLR0913
    experts: list[Path],
    *,
    method: str = "average",
    then: list[str | dict[str, Any]] | None = None,
    batch_norm: BatchNormPolicy = "base",
    seed: int = 0,
    base: str | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    refits: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Tell what bounds the excess error of a merge.

    Args:
        experts: one file per expert, each of another task, all of one base.
        method: how to merge; `mergekit-lit methods` lists them.
        then: veneers, such as `--then lines`.
        batch_norm: BatchNorm statistics of the merged model: `base`, `average`, `recalibrate` or
            `recalibrate-per-task`.
        seed: seed of methods that draw at random, and of the images for statistics.
        base: the base, if not the one that the first card names.
        include: patterns of the tensors to merge; all by default.
        exclude: patterns of the tensors that stay the base's.
        refits: whether to merge the refits that `StabilityTwins` exported beside the experts: the
            stability of any merge, linear or not.
        out: file of the record, ending in .json; nothing is written without one.
        json: whether to print the record as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    chosen = MERGE_METHODS.get(method_named(argv))
    flags = list(parameters(chosen.function))
    parser = _parser(chosen.function, flags)
    made = instantiated(parser, parse(parser, argv, positional="experts"))
    record = bound_files(
        made.experts,
        recipe=recipe_of(made, flags),
        base=made.base,
        calibration=calibration(**vars(made.data)),
        effort=made.effort,
        refits=made.refits,
        out=made.out,
    )
    if made.json:
        print_json(vars(record))
    else:
        _print(record)
    return 0


def _parser(function: Callable[..., Any], flags: Sequence[str]) -> ArgumentParser:
    parser = command_parser("bound", COMMANDS["bound"], usage=_USAGE)
    add_parameters(parser, options, skip=set(flags) & {"seed"})
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
    terms = [
        term if term["value"] is not None else {**term, "value": term["provenance"]}
        for term in found["terms"].values()
    ]
    print_table(terms, {"name": "term", "value": "value", "provenance": "from", "note": "note"})
    weighing = found["weighing"]
    print_table(
        [{"name": name, "value": weighing[name]} for name in _WEIGHING],
        {"name": "weighing", "value": "value"},
    )
    total = "unknown: a term of it is" if found["total"] is None else f"{found['total']:.4g}"
    effective = " (effective: adaptive optimizer)" if found["effective"] else ""
    print(f"total: {total}{effective}")
    for sentence in found["violated"]:
        print(f"does not hold: {sentence}")
    for sentence in record.metrics["signatures"]:
        print(f"signature: {sentence}")


_WEIGHING = ("a_eff", "chi2_lambda", "chi2_w", "tv_lambda", "tv_w")
