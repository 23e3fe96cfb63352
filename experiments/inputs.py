"""This file is what the experiments' commands are given, and how they refuse it, in one line.

It is a module, not a command.
"""

import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mergekit_lit.cli import one_line
from mergekit_lit.core.registry import unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What the value of a key must be.

    Attributes:
        told: in words.
        holds: whether a value is that.
    """

    told: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _each(value: Any, kind: Kind) -> bool:
    return isinstance(value, list) and bool(value) and all(map(kind.holds, value))


WORD = Kind("a word", lambda value: isinstance(value, str) and bool(value))
WORDS = Kind("a list of words", lambda value: _each(value, WORD))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a positive number", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
COUNT = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value > 0)
COUNTS = Kind("a list of whole numbers of at least 1", lambda value: _each(value, COUNT))
STEPS = Kind(
    "a list of whole numbers of at least 1, each above the one before",
    lambda value: _each(value, COUNT) and value == sorted(set(value)),
)
NATURAL = Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
SEEDS = Kind("a list of whole numbers of at least 0", lambda value: _each(value, NATURAL))
LIST = Kind("a list of one entry or more", lambda value: isinstance(value, list) and bool(value))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
GROUPS = Kind(
    "a mapping of sizes to numbers of groups, both at least 1",
    lambda value: MAPPING.holds(value) and all(map(COUNT.holds, [*value, *value.values()])),
)


def command(main: Callable[[], None]) -> int:
    """Run a script and return its exit code: wrong input is one line on stderr, and 2.

    MERGEKIT_LIT_TRACEBACK=1 shows where it comes from, as it does for `mergekit-lit`.
    """
    try:
        main()
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        if os.environ.get("MERGEKIT_LIT_TRACEBACK") == "1":
            raise
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def read_settings(
    path: Path, kinds: Mapping[str, Kind], *, optional: Collection[str] = (), **given: Any
) -> dict[str, Any]:
    """Return what a YAML file says, its own keys checked.

    Args:
        path: the file.
        kinds: what it may say, and what each value must be.
        optional: which of these it need not say.
        given: in place of the file's, where not None.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: an unknown key.
        ValueError: it is no YAML mapping, a key is missing, or a value is not what it must be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}.")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} must be a YAML file, but is not: {error}") from None
    settings = check_keys(repr(str(path)), found, kinds, optional=optional)
    settings |= {name: value for name, value in given.items() if value is not None}
    return check_keys("the flags", settings, kinds, optional=optional)


def check_keys(
    where: str, found: Any, kinds: Mapping[str, Kind], *, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Return a mapping whose keys are known and have values of their kinds.

    Raises:
        KeyError: an unknown key.
        ValueError: it is no mapping, a key is missing, or a value is not what it must be.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a mapping with {', '.join(kinds)}, but is {found!r}.")
    for name, value in found.items():
        if name not in kinds:
            raise KeyError(unknown_name(f"key of {where}", str(name), kinds))
        if not kinds[name].holds(value):
            raise ValueError(f"`{name}` of {where} must be {kinds[name].told}, but is {value!r}.")
    for name in kinds:
        if name not in found and name not in optional:
            raise ValueError(f"{where} must give `{name}`, {kinds[name].told}, but does not.")
    return {**found}


def built(where: str, kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of the values that a mapping names.

    Raises:
        KeyError: it has no such field.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type] # a dataclass
    for name in values:
        if name not in known:
            raise KeyError(unknown_name(f"key of {where}", str(name), known))
    return kind(**values)


def named(noun: str, wanted: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names that are wanted, all that are known where None are named.

    Raises:
        KeyError: one of them is unknown; the message offers the nearest and lists all.
    """
    names = list(known)
    chosen = names if wanted is None else list(wanted)
    for name in chosen:
        if name not in names:
            raise KeyError(unknown_name(noun, name, names))
    return chosen


def seeds_with(settings: Mapping[str, Any], given: Sequence[int] | None) -> list[int]:
    """Return the seeds of a file, and after them those given that it does not name.

    Raises:
        ValueError: one that is given is no seed.
    """
    check_keys("the flags", {"seeds": given or settings["seeds"]}, {"seeds": SEEDS})
    return list(dict.fromkeys([*settings["seeds"], *(given or ())]))
