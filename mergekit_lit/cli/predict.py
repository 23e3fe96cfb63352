"""This file is `mergekit-lit predict`: what merges of experts will reach, before they are scored.

Like `merge` it is parsed in two passes: the second knows the flags of the method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.calibration import calibration
from mergekit_lit.cli.initialisations import print_initialisations
from mergekit_lit.cli.method_flags import add_method, methods_named, recipe_of
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, instantiated, parse, read
from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import parameters
from mergekit_lit.reports.predictions import notes
from mergekit_lit.search.predicting.columns import Level
from mergekit_lit.search.predicting.initialisations import predict_initialisations
from mergekit_lit.search.predicting.predict import predict_files
from mergekit_lit.search.predicting.table import SHIPPED
from mergekit_lit.stages.opening import several_bases

_USAGE = (
    "EXPERT ... [--table FILE] [--method NAME[,NAME ...] [flags of one]] [--data.suite SUITE] "
    "[options]"
)


# Each argument is one flag of the command line, hence so many.
def options(  # noqa: PLR0913
    experts: list[Path],
    *,
    table: Path = SHIPPED,
    level: Level | None = None,
    method: Sequence[str] = ("average",),
    then: list[str | dict[str, Any]] | None = None,
    seed: int = 0,
    base: str | None = None,
    allow_different_base: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Predict what merges reach before they are scored, with 90 % intervals.

    Args:
        experts: one file per expert, each of another task. Of those of different bases it is told
            how far these lie apart, what merging and aligning costs, and whether to merge at all;
            only `level`, the images, `out` and `json` count there.
        table: measured merges to learn from, as `experiments/merges.py` writes them; `shipped`
            stands for those that come with the package.
        level: what is looked at: `cards` and weights (seconds); `data`, training and validation
            images of the suite too (minutes); `probe`, the plain average's scores on them as well.
            By default `data` where a suite is named, else `cards`.
        method: how to merge; `mergekit-lit methods` lists them. Several, such as
            `--method average,ties`, are compared, each with its defaults.
        then: veneers, such as `--then lines`.
        seed: seed of methods that draw at random.
        base: the base, if not the one that the first card names.
        allow_different_base: whether to take experts whose card names another base, or none.
        out: folder of the record and of the page `report.html`; or the record's file, ending in
            .json. Nothing is written without one.
        json: whether to print the record as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    functions = [MERGE_METHODS.get(name).function for name in methods_named(argv)]
    # Only of one method can the flags be told apart from those of others.
    own = functions if len(functions) == 1 else []
    flags = [flag for function in own for flag in parameters(function)]
    parser = _parser(own, flags)
    made = instantiated(parser, parse(parser, argv, positional="experts"))
    made.batch_norm, made.include, made.exclude = "base", None, None
    recipe, images = recipe_of(made, flags), calibration(**vars(made.data))
    level: Level = made.level or ("data" if images else "cards")
    if several_bases(made.experts):
        _check_used(parser, argv, made)
        record = predict_initialisations(
            made.experts, level=level, calibration=images, out=made.out
        )
        print_json(vars(record)) if made.json else print_initialisations(record)
        return 0
    record = predict_files(
        made.experts,
        [replace(recipe, method=name) for name in made.method],
        table=made.table,
        level=level,
        calibration=images,
        base=made.base,
        allow_different_base=made.allow_different_base,
        out=made.out,
    )
    if made.json:
        print_json(vars(record))
    else:
        _print(record)
    return 0


def _parser(own: Sequence[Callable[..., Any]], flags: Sequence[str]) -> ArgumentParser:
    parser = command_parser("predict", COMMANDS["predict"], usage=_USAGE)
    add_parameters(parser, options, skip=set(flags) & {"seed"})
    for function in own:
        add_method(parser, function)
    parser.add_function_arguments(calibration, "data")
    return parser


def _check_used(parser: ArgumentParser, argv: Sequence[str], made: Namespace) -> None:
    """Refuse what would count for nothing where experts of different bases are compared.

    Raises:
        ValueError: names the first flag of these that is not at its default.
    """
    defaults = parser.get_defaults()
    given = [
        key
        for key, value in made.items()
        if key.partition(".")[0] not in _OF_BASES and _plain(value) != _plain(defaults.get(key))
    ]
    if given:
        order = [key.rstrip("+") for key, _ in read(parser, argv).options]
        # What a file of parameters says comes after all flags.
        first = min(given, key=lambda key: order.index(key) if key in order else len(order))
        raise ValueError(
            f"`{first}` counts for nothing here: these experts are of different bases, and are "
            "compared without measured merges, by all ways to merge that are known for such. "
            "Leave it out, or give experts of one base."
        )


def _plain(value: Any) -> Any:
    # A default is a tuple where the parser makes a list.
    return list(value) if isinstance(value, tuple) else value


def _print(record: Record) -> None:
    """Print a row for each merge, the best first, then the tasks of each and what is like it."""
    merges = sorted(record.metrics["merges"], key=lambda found: -found["accuracy"]["value"])
    rows = [
        {"method": found["method"], **{name: _told(found[name]) for name in _OUTCOMES}}
        for found in merges
    ]
    print_table(rows, {"method": "method", **_OUTCOMES})
    terms = [
        name for name in merges[0]["terms"] if any(m["terms"][name] is not None for m in merges)
    ]
    print_table(
        [{"term": name, **{m["method"]: m["terms"][name] for m in merges}} for name in terms],
        {"term": "what drives it", **{found["method"]: found["method"] for found in merges}},
    )
    tasks = list(merges[0]["tasks"])
    print_table(
        [
            {"task": task, **{m["method"]: _told(m["tasks"][task]["accuracy"]) for m in merges}}
            for task in tasks
        ],
        {"task": "accuracy", **{found["method"]: found["method"] for found in merges}},
    )
    print_table(
        [{"merge": found["method"], **each} for found in merges for each in found["nearest"]],
        {
            "merge": "merge",
            "method": "nearest measured",
            "config": "with",
            "task": "task",
            "tasks": "merged with",
            "backbone": "backbone",
            "accuracy": "accuracy",
        },
    )
    measured = record.metrics["measured"]
    print(
        f"Learned from {measured['merges']} merges of {measured['groups']} groups of experts "
        f"({record.config['table']})."
    )
    for line in record.metrics["warnings"]:
        print(f"warning: {line}")
    for line in notes(record):
        print(line)


def _told(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


# What counts where experts of different bases are compared.
_OF_BASES = ("experts", "level", "data", "out", "json", "batch_norm", "include", "exclude")

_OUTCOMES = {"accuracy": "mean accuracy", "excess_error": "excess error"}
