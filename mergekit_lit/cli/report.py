"""This file is `mergekit-lit report`: the page of a run folder, or of a whole sweep."""

from collections.abc import Sequence

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse, values_of
from mergekit_lit.stages.report import build_report


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("report", COMMANDS["report"], usage="FOLDER [--out FILE] [options]")
    add_parameters(parser, build_report)
    given = vars(parse(parser, argv, positional="run"))
    # `--where A --where B` means both, where other flags would take the last.
    conditions = values_of(argv, "where")
    if conditions:
        given["where"] = ",".join(conditions)
    print(build_report(**given))
    return 0
