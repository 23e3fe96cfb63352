"""This file is `mergekit-lit tasks`: every task, and where its images are or would come from."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse

_HEADINGS = {
    "name": "task",
    "suites": "suites",
    "classes": "classes",
    "train": "train",
    "test": "test",
    "kind": "kind",
    "licence": "licence",
    "present": "here",
    "source": "source",
}


def tasks(*, suite: list[str] | None = None, root: Path | None = None, json: bool = False) -> None:
    """List suites and tasks.

    Args:
        suite: names of suites, or folders of your own tasks; null for all suites.
        root: folder of the downloaded data sets; null for the default one.
        json: whether to print JSON, which says more of each task.
    """
    from mergekit_lit.data.listing import tasks_table

    rows = tasks_table(*(suite or ()), root=root)
    if json:
        print_json(rows)
        return
    print_table(rows, _HEADINGS)
    for row in rows:
        if row["damage"]:
            print(f"{row['name']} is damaged: {row['damage']}")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("tasks", COMMANDS["tasks"], usage="[SUITE ...] [--json]")
    add_parameters(parser, tasks)
    tasks(**vars(parse(parser, argv, positional="suite")))
    return 0
