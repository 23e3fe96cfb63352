"""This file is a method's configuration: the keyword-only part of its signature, and its checks."""

import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mergekit_lit.core.registry import Registered, unknown_name
from mergekit_lit.merging.patterns import ByPattern, Gradient, rules_of

SCALE = "scale"
"""What every method calls the length of its step."""

_UNIONS = (Union, types.UnionType)
_SEQUENCES = (list, tuple, Sequence)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters, with annotations that are types and never text."""
    hints = get_type_hints(function)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def parameter_help(function: Callable[..., Any]) -> dict[str, str]:
    """Return the text of each entry of the docstring's Args section, on one line."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?: .*\n?|\n(?= ))+)", text, flags=re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section.group(1), flags=re.MULTILINE)
    return {name: " ".join(help_text.split()) for name, help_text in entries}


def resolve(
    method: Registered[Any], config: Mapping[str, Any], *, seed: int | None = None
) -> dict[str, Any]:
    """Return every parameter of `method` with its value: what `config` gives, else the default.

    A value may differ from tensor to tensor: by pattern, `{"blocks.*.attn.*": 0.5, "*": 0.3}`,
    where the first match wins and tensors that none matches keep the default; and by depth, where
    a number is due: `[0.1, 0.5]` goes from 0.1 in the first block to 0.5 in the last. Such values
    come back as `ByPattern`.

    Args:
        method: a registered method or veneer.
        config: values by parameter.
        seed: default of a parameter `seed`, if the merge has one; None leaves the method's own.

    Raises:
        KeyError: an unknown parameter; the message offers the nearest.
        ValueError: a parameter without a default is missing.
        TypeError: a value of the wrong type, NaN or infinite.
    """
    known = parameters(method.function)
    for name in config:
        if name not in known:
            raise KeyError(_unknown_parameter(method.name, name, known))
    values = {name: parameter.default for name, parameter in known.items()}
    values |= {"seed": seed} if seed is not None and "seed" in known else {}
    values |= config
    return {
        name: _read(f"`{name}` of {method.name!r}", known[name], value)
        for name, value in values.items()
    }


def to_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `resolve` returned as plain JSON values, which it takes again."""
    return {p: v.to_json() if isinstance(v, ByPattern) else v for p, v in config.items()}


def check_scale(scale: float) -> None:
    """Refuse a negative length of the step.

    Raises:
        ValueError: `scale` is below 0.
    """
    if scale < 0:
        raise ValueError(f"`scale` must be at least 0, but is {scale!r}.")


def check_interval(name: str, value: float, interval: str) -> None:
    """Refuse a value outside an interval, which is written as in mathematics: "(0, 1]".

    Raises:
        ValueError: `value` is outside.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"`{name}` must lie in {interval}, but is {value!r}.")


def accepts(annotation: Any, value: object) -> bool:
    """Return whether `value` is of the annotated type: a number must be finite and no bool."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in _UNIONS:
        return any(accepts(argument, value) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in _SEQUENCES:
        return isinstance(value, (list, tuple)) and all(
            accepts(arguments[0], item) for item in value
        )
    if annotation in (int, float):
        return _is_number(value, annotation)
    return isinstance(value, origin or annotation)


def in_words(annotation: Any) -> str:
    """Return what a message calls an annotated type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in _UNIONS:
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in _SEQUENCES:
        return f"a list (each item {in_words(arguments[0])})"
    words = {
        float: "a finite number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return words.get(annotation, str(annotation))


def _read(source: str, parameter: inspect.Parameter, value: object) -> Any:
    """Return one parameter's value, or its values by pattern, once they are of the right type."""
    if value is inspect.Parameter.empty:
        raise ValueError(f"{source} must be given, but is not.")
    if accepts(parameter.annotation, value):
        return value
    rules = [(p, _leaf(source, parameter, v)) for p, v in rules_of(value) or [("*", value)]]
    return ByPattern(source, tuple(rules), parameter.default)


def _leaf(source: str, parameter: inspect.Parameter, value: Any) -> Any:
    """Return the value of one pattern: plain, or numbers over the depth."""
    annotation = parameter.annotation
    if accepts(annotation, value):
        return value
    numbers = isinstance(value, (list, tuple)) and len(value) > 1
    if numbers and accepts(annotation, 0.5) and all(accepts(float, item) for item in value):
        return Gradient(tuple(float(item) for item in value))
    raise TypeError(f"{source} must be {in_words(annotation)}, but is {value!r}.")


def _is_number(value: object, annotation: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (annotation is float or isinstance(value, int))


def _unknown_parameter(method: str, name: str, known: Mapping[str, object]) -> str:
    if not known:
        return f"{method!r} takes no parameters, but got {name!r}. Leave it out."
    return unknown_name(f"parameter of {method!r}", name, known)
