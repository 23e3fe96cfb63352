"""This file is `mergekit-lit methods`: every registered merge method, plug-ins included."""

from collections.abc import Sequence

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse


def methods(*, json: bool = False) -> None:
    """List the merge methods.

    Args:
        json: whether to print JSON, with type, default and explanation of each parameter.
    """
    from mergekit_lit.merging import methods_table

    rows = methods_table()
    if json:
        print_json(rows)
        return
    for row in rows:
        row["flags"] = [
            f"--{parameter['name']}"
            + ("" if parameter["default"] is None else f" {parameter['default']}")
            for parameter in row["parameters"]
        ]
    headings = {"name": "method", "summary": "what it does", "data": "data", "flags": "flags"}
    print_table(rows, headings | {"source": "source"})
    print("The flags of one method: mergekit-lit merge --method NAME --help")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("methods", COMMANDS["methods"], usage="[--json]")
    add_parameters(parser, methods)
    methods(**vars(parse(parser, argv)))
    return 0
