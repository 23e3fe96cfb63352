"""This file is `mergekit-lit quickstart`: the whole path in one command."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.search.quickstart import run_quickstart


def options(*, json: bool = False) -> None:
    """Say how the result is told.

    Args:
        json: whether to print the record as JSON, and nothing else.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("quickstart", COMMANDS["quickstart"])
    add_parameters(parser, run_quickstart)
    add_parameters(parser, options)
    namespace = parse(parser, argv)
    given = dict(vars(namespace))
    json = given.pop("json")
    result = run_quickstart(**{**given, "quiet": given["quiet"] or json})
    write_config(config_texts(parser, argv, namespace), Path(namespace.out) / "config")
    if json:
        print_json(vars(result.record))
    return 0
