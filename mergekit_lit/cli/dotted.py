"""This file is configurations by dotted key, as the axes of a sweep name parameters."""

import re
from collections.abc import Collection, Hashable, Mapping
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


def refuse_idle(point: Mapping[str, Any], idle: Collection[str]) -> None:
    """Refuse axes that decide no result, such as where it goes.

    Raises:
        ValueError: names the first of them.
    """
    for key in point:
        if key in idle:
            raise ValueError(
                f"The axis `{key}` must decide what comes out, but does not: give it one value, "
                "outside `axes`."
            )


def interpolated(given: Mapping[str, Any], point: Mapping[str, Any]) -> Hashable:
    """Return the values of a point that interpolations such as `${data.split_seed}` may refer to.

    Points that agree in them have the same interpolated values.
    """
    named = " ".join(re.findall(r"\$\{([^}]*)\}", repr(given)))
    return tuple((key, repr(point[key])) for key in point if key.rpartition(".")[2] in named)


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
