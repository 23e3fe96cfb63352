"""This file saves the configuration of a run, so that the run can be made again from it.

`config.yaml` keeps interpolations (`out: runs/${data.task}`), so that it can be varied;
`config.resolved.yaml` holds what they came to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli.parsing import read
from mergekit_lit.cli.yaml_files import load_yaml
from mergekit_lit.core.files import write_text


def config_texts(
    parser: ArgumentParser,
    argv: Sequence[str],
    namespace: Namespace,
    *,
    positional: str | None = None,
) -> dict[str, str]:
    """Return the YAML of the unresolved and of the resolved parameters, by file ending.

    Args:
        parser: the command's parser.
        argv: what the user wrote.
        namespace: what `parse` made of it.
        positional: the key that arguments without a flag went to.
    """
    resolved = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    unresolved = _with_interpolations(resolved, _as_written(parser, argv, positional))
    return {
        ".yaml": yaml.safe_dump(unresolved, sort_keys=False),
        ".resolved.yaml": yaml.safe_dump(resolved, sort_keys=False),
    }


def write_config(texts: dict[str, str], stem: Path) -> None:
    """Write both texts: `stem`.yaml and `stem`.resolved.yaml."""
    for ending, text in texts.items():
        write_text(stem.with_name(stem.name + ending), text)


def _as_written(
    parser: ArgumentParser, argv: Sequence[str], positional: str | None
) -> dict[str, Any]:
    """Return what files and flags say, later over earlier, flags last, nothing resolved."""
    given = read(parser, argv)
    written: dict[str, Any] = {}
    for path in given.configs:
        written = merged_values(written, load_yaml(path))
    for key, text in given.options:
        nested: Any = text
        for part in reversed(key.split(".")):
            nested = {part: nested}
        written = merged_values(written, nested)
    if positional and given.positionals:
        written[positional] = given.positionals
    return written


def merged_values(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return `left` with `right` over it; mappings are merged, everything else is replaced."""
    merged = dict(left)
    for key, value in right.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merged_values(below, value)
        else:
            merged[key] = value
    return merged


def _with_interpolations(resolved: Any, written: Any) -> Any:
    """Return `resolved` with each value that was written as an interpolation put back."""
    if isinstance(resolved, dict) and isinstance(written, dict):
        return {
            key: _with_interpolations(value, written[key]) if key in written else value
            for key, value in resolved.items()
        }
    return written if "${" in str(written) else resolved
