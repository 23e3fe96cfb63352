"""This file is the one mechanism of extension: named functions, with facts, from anywhere."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T", bound=Callable[..., Any])
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registered(Generic[T]):
    """One registered function and what was declared of it.

    Attributes:
        name: the function's own name, which is its key everywhere.
        function: the function, untouched.
        facts: what the decorator declared.
    """

    name: str
    function: T
    facts: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


class Registry(Generic[T]):
    """Functions by name, filled by a decorator here and through entry points elsewhere."""

    def __init__(self, noun: str, group: str) -> None:
        """Make an empty registry.

        Args:
            noun: what an entry is called in messages, such as `merge method`.
            group: entry-point group whose modules are imported at the first look-up.
        """
        self._noun = noun
        self._group = group
        self._entries: dict[str, Registered[T]] = {}
        self._loaded = False

    def add(self, **facts: Any) -> Callable[[F], F]:
        """Register the decorated function under its own name, and return it untouched.

        Raises:
            ValueError: the name is taken by another function.
        """

        def register(function: F) -> F:
            name = function.__name__
            taken = self._entries.get(name)
            if taken is not None and taken.function.__module__ != function.__module__:
                raise ValueError(
                    f"The name of a {self._noun} must be free, but {name!r} is taken by "
                    f"{taken.function.__module__}. Rename yours."
                )
            # `add` keeps the decorated function's own type, which is narrower than T.
            entry = Registered(name, cast("T", function), MappingProxyType(dict(facts)))
            self._entries[name] = entry
            return function

        return register

    def get(self, name: str) -> Registered[T]:
        """Return an entry.

        Raises:
            KeyError: no such name; the message offers the nearest and lists all.
        """
        self._load()
        if name not in self._entries:
            raise KeyError(unknown_name(self._noun, name, self._entries))
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return every name, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def __iter__(self) -> Iterator[Registered[T]]:
        """Iterate over the entries, sorted by name."""
        return iter([self.get(name) for name in self.names()])

    def _load(self) -> None:
        if self._loaded:
            return
        for entry_point in metadata.entry_points(group=self._group):
            try:
                entry_point.load()
            except ImportError as error:
                raise ValueError(
                    f"The plug-in {entry_point.name!r} must be importable, but is not: {error}. "
                    f"Mend or uninstall the package that brings {entry_point.value!r}."
                ) from error
        self._loaded = True


def unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """Return the one-line message for an unknown name: the nearest, then all that are known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"No {noun} named {name!r}.{hint} Known: {', '.join(names)}."


MERGE_METHODS: Registry[Any] = Registry("merge method", "mergekit_lit.merge_methods")
VENEERS: Registry[Any] = Registry("veneer", "mergekit_lit.veneers")
SUITES: Registry[Any] = Registry("suite", "mergekit_lit.suites")
