"""This file is `mergekit-lit methods`: every merge method and veneer, plug-ins included."""

from collections.abc import Sequence
from typing import Any

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse


def methods(*, json: bool = False) -> None:
    """List the merge methods, and the veneers that go before or after any of them.

    Args:
        json: whether to print JSON, with type, default and explanation of each parameter; veneers
            come last, as rows of the form `veneer`.
    """
    from mergekit_lit.merging.listing import methods_table, veneers_table

    rows, veneers = methods_table(), veneers_table()
    if json:
        print_json([*rows, *veneers])
        return
    last = {"summary": "what it does", "data": "data", "flags": "flags", "source": "source"}
    print_table([_with_flags(row) for row in rows], {"name": "method", **last})
    last["flags"] = "parameters"
    print_table([_with_flags(row) for row in veneers], {"name": "veneer", "position": "", **last})
    print("The flags of one method: mergekit-lit merge --method NAME --help")
    print("Veneers are added to a method: mergekit-lit merge --method NAME --then VENEER")


def _with_flags(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with `flags`: each parameter and its default."""
    dashes = "" if row["form"] == "veneer" else "--"
    flags = [
        f"{dashes}{parameter['name']}"
        + ("" if parameter["default"] is None else f" {parameter['default']}")
        for parameter in row["parameters"]
    ]
    return {**row, "flags": flags}


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("methods", COMMANDS["methods"], usage="[--json]")
    add_parameters(parser, methods)
    methods(**vars(parse(parser, argv)))
    return 0
