"""This file turns flags and YAML files into typed parameters: one hop from key to parameter.

jsonargparse does the typing. Here stands what a user expects around it: flags win over files in any
order, a bare `--resume` means true, `--steps 100,200` is a list, files can be named without a flag,
and an unknown key is told with its nearest right one.
"""

import inspect
import json
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli.actions import (
    LISTS,
    action_of,
    as_list,
    holds_things,
    is_group,
    kinds_of,
    next_value,
    spelt,
)
from mergekit_lit.cli.messages import told, unknown_key
from mergekit_lit.cli.yaml_files import load_yaml


@dataclass(frozen=True)
class Given:
    """What the user wrote, before any typing.

    Attributes:
        options: (key, text) of each flag in order; None where a flag has no value.
        configs: files of `--config`, in order.
        positionals: arguments without a flag.
    """

    options: list[tuple[str, str | None]] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)


def command_parser(name: str, summary: str, *, usage: str = "[options]") -> ArgumentParser:
    """Return the parser of one command, with `--config` and without parameters yet."""
    parser = ArgumentParser(
        prog=f"mergekit-lit {name}",
        usage=f"mergekit-lit {name} {usage}",
        description=summary,
        # Interpolations are resolved after all files and flags; plain `omegaconf` would be stale.
        parser_mode="omegaconf+",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of parameters; repeatable, later ones win."
    )
    return parser


def add_parameters(
    parser: ArgumentParser, function: Callable[..., Any], *, skip: set[str] | None = None
) -> list[str]:
    """Make each parameter of a function a flag, explained by its docstring, and return the keys."""
    added = parser.add_function_arguments(function, skip=set(skip or ()), fail_untyped=False)
    return list(added)


def add_group(parser: ArgumentParser, group: type, name: str, **explained: str) -> None:
    """Make the arguments of a class flags under `name`, explained by the docstring of its init.

    Args:
        parser: the command's parser.
        group: the class.
        name: name of the group.
        explained: other words for some arguments, by name.
    """
    parser.add_class_arguments(group, name)
    # jsonargparse lets the Attributes of a class hide the Args of its __init__.
    init = docstring_parser.parse(inspect.getdoc(group.__init__) or "")  # type: ignore[misc] # of a class that we name
    words = {item.arg_name: item.description for item in init.params} | explained
    for action in parser._actions:
        outer, _, last = action.dest.rpartition(".")
        if outer == name and last in words:
            action.help = words[last]


def parse(
    parser: ArgumentParser, argv: Sequence[str], *, positional: str | None = None
) -> Namespace:
    """Return the typed parameters of `argv`.

    Args:
        parser: the command's parser.
        argv: what follows the command's name.
        positional: the key that arguments without a flag go to.

    Raises:
        ValueError: an unknown key, a wrong value, a missing one; in one line.
        SystemExit: help was asked for, and printed.
    """
    given = read(parser, argv)
    arguments = [f"--config={_config(parser, path)}" for path in given.configs]
    if given.positionals:
        arguments.append(_positional(parser, positional, given.positionals))
    arguments += [f"--{key}" if text is None else f"--{key}={text}" for key, text in given.options]
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(told(parser, str(error))) from None
    namespace.pop("config", None)
    return namespace


def parse_mapping(parser: ArgumentParser, values: dict[str, Any], *, source: str = "") -> Namespace:
    """Return the typed parameters of what a file of parameters would hold.

    Args:
        parser: the command's parser.
        values: nested values by key.
        source: where they come from, with its own punctuation.

    Raises:
        ValueError: an unknown key, a wrong value, a missing one; in one line.
    """
    check_keys(parser, values, source=source)
    try:
        # The parser types what lists hold where they are.
        namespace: Namespace = parser.parse_object(_with_lists(parser, deepcopy(values)))
    except ArgumentError as error:
        raise ValueError(source + told(parser, str(error))) from None
    namespace.pop("config", None)
    return namespace


def read(parser: ArgumentParser, argv: Sequence[str]) -> Given:
    """Sort the words of a command line into flags, files and the rest.

    Raises:
        ValueError: an unknown flag, or one without its value.
    """
    given = Given()
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key, plus = (key[:-1], "+") if key.endswith("+") else (key, "")
        key = spelt(parser, key)
        # `key=value` without dashes is what a W&B agent passes with ${args_no_hyphens}.
        if not word.startswith("-") and not (equals and action_of(parser, key)):
            given.positionals.append(word)
            continue
        if word == "-h":
            key = "help"
        action = action_of(parser, key)
        if action is None:
            raise ValueError(unknown_key(parser, key))
        value = text if equals else next_value(action, key, words)
        if holds_things(action) and any(key == before.rstrip("+") for before, _ in given.options):
            plus = "+"
        if key == "config" and value is not None:
            given.configs.append(value)
        else:
            given.options.append((key + plus, as_list(action, value) if not plus else value))
    return given


def values_of(argv: Sequence[str], key: str) -> list[str]:
    """Return what is given for one key, in order, without a parser: for a first pass."""
    values = []
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, text = word.removeprefix("--").partition("=")
        if name == key and (equals or word.startswith("--")):
            values.append(text if equals else after)
    return values


def value_of(parser: ArgumentParser, key: str, text: str | None) -> Any:
    """Return what a flag says, as a file of parameters would hold it.

    What is to be a word or a path stays one, though it looks like a number: `--out 2024`.
    """
    try:
        value = True if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    kinds = kinds_of(getattr(action_of(parser, key), "_typehint", None))
    if {str, Path}.isdisjoint(kinds) or value is None or type(value) in (*kinds, list, dict):
        return value
    return text


def check_keys(
    parser: ArgumentParser, values: dict[str, Any], *, source: str = "", above: str = ""
) -> None:
    """Refuse keys that are no parameters.

    Raises:
        ValueError: names the first unknown key, the nearest right one, and the source.
    """
    for key, value in values.items():
        name = f"{above}{key}".removesuffix("+")
        if isinstance(value, dict) and is_group(parser, name):
            check_keys(parser, value, source=source, above=f"{name}.")
        elif action_of(parser, name) is None:
            raise ValueError(unknown_key(parser, name, source=source))


def _config(parser: ArgumentParser, path: str) -> str:
    """Return a file of parameters as `--config` takes it: its path, or its text with lists made."""
    values = load_yaml(path)
    check_keys(parser, values, source=f"{path}: ")
    listed = _with_lists(parser, values)
    return path if listed == values else yaml.safe_dump(listed, sort_keys=False)


def _with_lists(
    parser: ArgumentParser, values: dict[str, Any], *, above: str = ""
) -> dict[str, Any]:
    """Return values of a file with one number or word made a list where the parameter is one."""
    listed = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            inner = _with_lists(parser, value, above=f"{name}.")
            listed[key] = inner if is_group(parser, name) else value
            continue
        action = parser._option_string_actions.get(f"--{name}")
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        made = as_list(action, text) if action else text
        listed[key] = value if made == text else yaml.safe_load(str(made))
    return listed


def _positional(parser: ArgumentParser, key: str | None, words: list[str]) -> str:
    action = action_of(parser, key) if key else None
    if key is None or action is None:
        raise ValueError(f"Every argument must be a flag, but {words[0]!r} is none.")
    if any(get_origin(kind) in LISTS for kind in kinds_of(getattr(action, "_typehint", 0))):
        return f"--{key}={json.dumps(words)}"
    if len(words) > 1:
        raise ValueError(f"`{key}` must be one argument, but {len(words)} came: {words}.")
    return f"--{key}={words[0]}"


def instantiated(parser: ArgumentParser, namespace: Namespace) -> Namespace:
    """Return the namespace with objects in place of the classes that it names.

    Raises:
        ValueError: a class refuses its arguments, in its own words.
    """
    try:
        made: Namespace = parser.instantiate(namespace)
    except ValueError as error:
        raise ValueError(told(parser, str(error))) from error
    return made
