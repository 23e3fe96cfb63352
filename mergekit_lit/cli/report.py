"""This file is `mergekit-lit report`: the page of a run folder."""

from collections.abc import Sequence

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse
from mergekit_lit.stages.report import build_report


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("report", COMMANDS["report"], usage="RUN_FOLDER [--out FILE] [options]")
    add_parameters(parser, build_report)
    print(build_report(**vars(parse(parser, argv, positional="run"))))
    return 0
