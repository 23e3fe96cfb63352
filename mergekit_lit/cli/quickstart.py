"""This file is `mergekit-lit quickstart`: the whole path in one command."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.search.quickstart import run_quickstart


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("quickstart", COMMANDS["quickstart"])
    add_parameters(parser, run_quickstart)
    namespace = parse(parser, argv)
    run_quickstart(**vars(namespace))
    write_config(config_texts(parser, argv, namespace), Path(namespace.out) / "config")
    return 0
