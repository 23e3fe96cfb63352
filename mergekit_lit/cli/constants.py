"""This file is `mergekit-lit constants`: what the bound takes, measured on the experts' images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.calibration import calibration
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, instantiated, parse
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.records import Record
from mergekit_lit.stages.bound import bound_files
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.effort import Effort

_USAGE = "EXPERT ... --data.suite SUITE [options]"


def options(
    experts: list[Path],
    *,
    batch_norm: BatchNormPolicy = "base",
    base: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure the constants of the bound at the base and at the plain average.

    Args:
        experts: one file per expert, each of another task, all of one base.
        batch_norm: BatchNorm statistics of the average: `base`, `average`, `recalibrate` or
            `recalibrate-per-task`.
        base: the base, if not the one that the first card names.
        out: file of the record, ending in .json; nothing is written without one.
        json: whether to print the record as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = _parser()
    made = instantiated(parser, parse(parser, argv, positional="experts"))
    images = calibration(**vars(made.data))
    if images is None:
        raise ValueError("`data.suite` must name the suite of the experts' tasks, but does not.")
    record = bound_files(
        made.experts,
        recipe=Recipe(batch_norm=made.batch_norm),
        base=made.base,
        calibration=images,
        effort=made.effort,
        out=made.out,
    )
    if made.json:
        print_json(vars(record))
    else:
        _print(record)
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser("constants", COMMANDS["constants"], usage=_USAGE)
    add_parameters(parser, options)
    parser.add_function_arguments(calibration, "data")
    parser.add_class_arguments(Effort, "effort")
    return parser


def _print(record: Record) -> None:
    """Print each constant with its interval, and the gradients of single images that it took."""
    rows = list(_rows(record.metrics["constants"]))
    headings = {"name": "constant", "where": "where", "value": "value", "interval": "95 % interval"}
    print_table(rows, {**headings, "samples": "gradients"})
    print(f"{record.cpu_seconds:.0f} s of processor time")


def _rows(constants: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for place in ("base", "merged"):
        point = constants[place]
        yield _row("||grad F_S||^2", place, point["gradient2"])
        for task, estimate in point["noise"].items():
            yield _row(f"sigma^2, {task}", place, estimate)
        for task, estimate in point["zeta2"].items():
            yield _row(f"zeta^2, {task}", place, estimate)
        for task, estimate in point["own_gradient2"].items():
            yield _row(f"||grad F_Si||^2, {task}", place, estimate)
        for task, estimate in point["slopes"].items():
            yield _row(f"slope along the step, {task}", place, estimate)
    yield _row("G^2", "merged", constants["sample_gradient2"])
    smooth = constants["smoothness"]
    yield _row("L, 95 % of the secants", "around", smooth["secant"])
    eigenvalue = smooth["eigenvalue"]
    images = smooth["images"] * 2 * eigenvalue["products"]
    name = "dominant eigenvalue (interval: the residual)"
    yield _row(name, "merged", {**eigenvalue, "samples": images})
    for task, curvature in smooth["along"].items():
        if curvature is not None:
            yield _row(f"curvature along {task}", "merged", curvature)


def _row(name: str, where: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row of an estimate, or of an eigenvalue, whose interval the residual gives."""
    low, high = estimate["low"], estimate["high"]
    interval = None if low is None else f"{low:.4g} to {high:.4g}"
    return {
        "name": name,
        "where": where,
        "value": estimate["value"],
        "interval": interval,
        "samples": estimate["samples"],
    }
