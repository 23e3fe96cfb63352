"""This file is configurations by dotted key, as the axes of a sweep name parameters."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

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


def interpolated(
    given: Mapping[str, Any], base: Config, idle: Collection[str]
) -> Callable[[Mapping[str, Any]], Config]:
    """Return what tells a point's values together with those interpolated from them.

    A parser would resolve `${model.seed}` as well, but takes a thousand times as long.

    Args:
        given: nested values of the file, interpolations as they stand.
        base: complete configuration of one of the points; all of them have the same keys.
        idle: keys that decide no result.
    """
    written = {key: value for key, value in flat(given).items() if "${" in repr(value)}
    written = {key: value for key, value in written.items() if key not in idle}
    if not written:
        return dict
    whole = OmegaConf.create(nested({**base, **written}))

    def values(point: Mapping[str, Any]) -> Config:
        for key, value in point.items():
            OmegaConf.update(whole, key, value)
        found = {key: OmegaConf.select(whole, key) for key in written}
        plain = {
            key: OmegaConf.to_container(value, resolve=True)
            if OmegaConf.is_config(value)
            else value
            for key, value in found.items()
        }
        return {**plain, **point}

    return values


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
