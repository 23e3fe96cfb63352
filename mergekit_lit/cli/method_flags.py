"""This file is what flags say of a merge: its method with its own flags, veneers and observers."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Union

from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli.parsing import values_of
from mergekit_lit.cli.yaml_files import load_yaml
from mergekit_lit.core.merging import MergeObserver
from mergekit_lit.merging.configuration import accepts, parameter_help, parameters
from mergekit_lit.stages.recipes import Recipe


def veneers(given: Sequence[str | dict[str, Any]] | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the names of veneers, and values for their parameters, that `--then` holds."""
    return [_veneer(each) for each in given or ()]


def method_named(argv: Sequence[str]) -> str:
    """Return the method that the flags name, or else the last file that names one."""
    name = "average"
    for path in values_of(argv, "config"):
        name = str(load_yaml(path).get("method", name))
    return [name, *values_of(argv, "method")][-1]


def methods_named(argv: Sequence[str]) -> list[str]:
    """Return the methods named, one or several with commas between, before flags are known."""
    return [name.strip(" []'\"") for name in method_named(argv).split(",")]


def add_method(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    """Make each parameter of a method a flag that takes values by pattern and depth too."""
    words = parameter_help(function)
    group = parser.add_argument_group((function.__doc__ or "").split("\n")[0].rstrip("."))
    for name, parameter in parameters(function).items():
        required = parameter.default is inspect.Parameter.empty
        group.add_argument(
            f"--{name}",
            type=_by_tensor(parameter.annotation),
            default=None if required else parameter.default,
            required=required,
            help=words.get(name),
        )


def _by_tensor(annotation: Any) -> Any:
    """Return the type of a parameter whose value may differ from tensor to tensor."""
    gradient = [list[float]] if accepts(annotation, 0.5) else []
    # Of the forms by pattern, the list is the one that records hold.
    return Union[(annotation, *gradient, dict[str, Any], list[dict[str, Any]])]


def recipe_of(made: Namespace, flags: Sequence[str]) -> Recipe:
    """Return what the flags say of the merge itself; number types where the command has them."""
    return Recipe(
        method=made.method,
        config={flag: made[flag] for flag in flags},
        veneers=veneers(made.then),
        batch_norm=made.batch_norm,
        include=made.include or (),
        exclude=made.exclude or (),
        dtype=made.get("dtype"),
        out_dtype=made.get("out_dtype", "base"),
        seed=made.seed,
    )


def _veneer(given: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a veneer and values for its parameters."""
    if isinstance(given, str):
        return given, {}
    name, config = given.get("name"), given.get("config", {})
    if set(given) - {"name", "config"} or not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(
            f"`then` must hold names of veneers, or `name` and `config` of each, but is {given!r}."
        )
    return name, config


def observer_of(given: str | dict[str, Any]) -> MergeObserver:
    """Return an observer of the class that `given` names.

    It is not typed as `MergeCallback`: that would import Lightning, which merging does not need.
    """
    path = given if isinstance(given, str) else str(given.get("class_path", ""))
    arguments = {} if isinstance(given, str) else given.get("init_args", {})
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            "`callbacks` must name classes by their path, such as "
            "mergekit_lit.callbacks.DeltaGeometry, or hold `class_path` and `init_args` of each, "
            f"but one is {given!r}."
        )
    try:
        made = getattr(importlib.import_module(module), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`callbacks` must name classes by their path, but {path!r}: {error}"
        ) from None
    if not hasattr(made, "on_merge_tensor"):
        raise TypeError(
            f"`callbacks` must be observers of merging, but {path!r} has no `on_merge_tensor`. "
            "Derive it from mergekit_lit.callbacks.MergeCallback."
        )
    observer: MergeObserver = made
    return observer
