"""This file is `mergekit-lit card`: what a file of ours, or of others, holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import add_parameters, command_parser, parse


def card(file: Path, *, json: bool = False) -> None:
    """Print what a file holds.

    Args:
        file: an expert, merged model or base, or anybody's safetensors file.
        json: whether to print JSON.
    """
    facts = describe(file)
    if json:
        print_json(facts)
        return
    rows = [{"fact": key, "value": _words(value)} for key, value in _flat(facts).items()]
    print_table(rows, {"fact": "", "value": ""})


def describe(file: Path) -> dict[str, Any]:
    """Return the facts of a file: kind, tensors, entries, hash, and its card or method.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, a folder, or a pickle.
    """
    from mergekit_lit.core.files import file_hash
    from mergekit_lit.core.tensorfiles import TensorFile

    if file.is_dir():
        raise ValueError(
            f"`file` must be a file, but {str(file)!r} is a folder. Name a file of it."
        )
    tensors = TensorFile(file)
    # Reading a tensor compares it with its checksum: a damaged file has no card to trust.
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    header = {
        key: value for key, value in tensors.facts.items() if key not in ("structure", "kind")
    }
    return {
        "file": str(file),
        "kind": tensors.facts.get("kind", "foreign"),
        "sha256": file_hash(file),
        "tensors": len(sizes),
        "entries": sum(sizes.values()),
        **header,
    }


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("card", COMMANDS["card"], usage="FILE [--json]")
    add_parameters(parser, card)
    card(**vars(parse(parser, argv, positional="file")))
    return 0


def _flat(facts: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _words(value: Any) -> Any:
    return "unknown" if value is None else value
