"""This file is configurations by dotted key, as the axes of a sweep name parameters."""

from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli.parsing import parse_mapping
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.search.sweeping.jobs import Config

# Groups of parameters of all jobs; the values of other keys may be mappings of their own.
_GROUPS = ("data", "model", "trainer")


def typed(parser: ArgumentParser, given: Mapping[str, Any], point: Mapping[str, Any]) -> Config:
    """Return what file and flags say with a point set: typed, complete, and as YAML has it.

    Args:
        parser: of the command.
        given: nested values.
        point: values by dotted key, which win.

    Raises:
        ValueError: an unknown key, or a wrong or missing value.
    """
    namespace = parse_mapping(parser, merged_values(dict(given), nested(point)))
    return flat(yaml.safe_load(parser.dump(namespace, skip_unset=False)))


def flat(values: Mapping[str, Any]) -> Config:
    """Return nested values by dotted key; only groups of parameters are taken apart."""
    config: Config = {}
    for key, value in values.items():
        if key in _GROUPS and isinstance(value, dict):
            config |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            config[key] = value
    return config


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as a file of parameters nests them."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        inner = whole
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return whole
