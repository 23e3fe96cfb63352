"""This file is what is known of a parser's parameters: which there are, and what each takes."""

import collections.abc
import json
import re
from argparse import Action
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser

LISTS = (list, tuple, collections.abc.Sequence)


def spelt(parser: ArgumentParser, key: str) -> str:
    """Return `batch_norm` for `batch-norm`, where that is the parameter's name."""
    name = key.replace("-", "_")
    return name if action_of(parser, key) is None and action_of(parser, name) else key


def action_of(parser: ArgumentParser, key: str) -> Action | None:
    """Return the action of a key; for a key inside a class or a dict, that of the outer one."""
    actions: dict[str, Action] = parser._option_string_actions
    if f"--{key}" in actions:
        return actions[f"--{key}"]
    outer = key.rpartition(".")[0]
    while outer:
        if f"--{outer}" in actions and not is_group(parser, outer):
            return actions[f"--{outer}"]
        outer = outer.rpartition(".")[0]
    return None


def is_group(parser: ArgumentParser, key: str) -> bool:
    """Whether the key is a group of parameters, such as `data` or `trainer`."""
    return any(action.dest.startswith(f"{key}.") for action in parser._actions if _takes(action))


def _takes(action: Action) -> bool:
    return not action.dest.endswith(".help")


def next_value(action: Action, key: str, words: list[str]) -> str | None:
    """Take the flag's value off the rest of the line; None where it has none."""
    if action.nargs == 0 or key == "print_config":
        return None
    if key.endswith(".help"):
        return words.pop(0) if words and not words[0].startswith("-") else None
    if getattr(action, "_typehint", None) is bool:
        return words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
    if not words or words[0].startswith("--"):
        raise ValueError(f"`{key}` must be followed by a value: --{key} VALUE.")
    return words.pop(0)


def as_list(action: Action, text: str | None) -> str | None:
    """Return `[a,b]` for `a,b` where the parameter is a list of plain values."""
    if text is None or text.lstrip().startswith("[") or text in ("null", ""):
        return text
    kinds = kinds_of(getattr(action, "_typehint", None))
    items = [get_args(kind) for kind in kinds if get_origin(kind) in LISTS]
    plain = holds_things(action) or any(set(of) <= {int, float, str, Path, ...} for of in items)
    numeric = not set(kinds).isdisjoint((int, float))
    single = numeric and ("," not in text or text.lstrip().startswith("{"))
    if not items or not plain or str in kinds or single or "${" in text:
        return text
    named = not holds_things(action) and any(set(of) <= {str, Path, ...} for of in items)
    if named and not set(text) & set("\"'"):
        # To YAML, `*.bias` would be an alias; commas inside braces belong to a pattern.
        words = [word.strip() for word in re.split(r",(?![^{]*\})", text)]
        return json.dumps(words, ensure_ascii=False)
    return f"[{text}]"


def holds_things(action: Action) -> bool:
    """Whether the parameter is a list of names or mappings, which `--key A --key B` collects."""
    kinds = kinds_of(getattr(action, "_typehint", None))
    lists = [kind for kind in kinds if get_origin(kind) in LISTS]
    items = [item for kind in lists for item in get_args(kind)]
    return any(set(kinds_of(item)) == {str, dict[str, Any]} for item in items)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
