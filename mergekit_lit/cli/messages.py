"""This file words, in one line, what is wrong with flags and YAML files."""

import difflib
import re

from jsonargparse import ArgumentParser

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)$', re.DOTALL)
_EXPECTED = re.compile(r"Expected an? (?P<kind>.+?)(?:\. Got value: .*)?$", re.MULTILINE)
_VALUE = re.compile(r"(?:Got value|Given value): (?P<value>.*)", re.DOTALL)
# Names of Lightning's Trainer that are ours to decide, and what says them here.
_ELSEWHERE = {
    "trainer.enable_checkpointing": "checkpoint_every",
    "trainer.logger": "logger",
    "trainer.max_epochs": "steps",
    "trainer.max_steps": "steps",
    "trainer.default_root_dir": "out",
}
_WORDS = {
    "<class 'NoneType'>": "null",
    "<class 'float'>": "a finite number",
    "<class 'int'>": "a whole number",
}
# What a class of ours says of its arguments, among the ways in which the parser could not read it.
_OWN = re.compile(r"- (?P<why>`\w+` must [^\n]*?\.)(?=\s+- |\s*$)", re.MULTILINE)
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']+)', val='(?P<value>[^']*)'\)")
_PROBLEM = re.compile(r"Problem with given class_path '[^']+':\s*(?P<why>[^\n]+)")


def unknown_key(parser: ArgumentParser, key: str, *, source: str = "") -> str:
    """Return the message for a key that is no parameter, with the nearest right key.

    Args:
        parser: the command's parser.
        key: what came, without dashes.
        source: where it came from, with its own punctuation.
    """
    known = sorted(
        option.removeprefix("--")
        for option in parser._option_string_actions
        if option.startswith("--") and not option.endswith(("+", ".help"))
    )
    near = _ELSEWHERE.get(key) or _nearest(key, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"{source}No parameter named {key!r}.{hint} All of them: {parser.prog} --help"


def told(parser: ArgumentParser, message: str) -> str:
    """Return jsonargparse's message in this project's words."""
    required = re.search(r"arguments are required: (.*)", message)
    if required:
        keys = "`, `".join(required[1].split(", "))
        return f"`{keys}` must be given, as a flag or in a file. See: {parser.prog} --help"
    found = _KEY.match(message)
    own = _OWN.search(message)
    if own:
        return f"`{found['key']}`: {own['why']}" if found else own["why"]
    if not found:
        return " ".join(message.split())
    return _of_key(found["key"], found["rest"])


def _of_key(key: str, rest: str) -> str:
    """Return what is wrong with the value of one key."""
    value = _VALUE.search(rest)
    came = " ".join(value["value"].split()) if value else "something else"
    nested = _NESTED.search(rest)
    if nested:
        return (
            f"`{key}.{nested['key']}` must be an argument of the class named before it, and of its "
            f"type, but is {nested['value']!r}. See what that class takes."
        )
    problem = _PROBLEM.search(rest)
    if problem:
        return f"`{key}` must name classes by their path, but {came}: {problem['why'].strip()}."
    kinds = list(dict.fromkeys(_kind(kind) for kind in _EXPECTED.findall(rest)))
    if not kinds:
        return f"`{key}`: {' '.join(rest.split())}"
    return f"`{key}` must be {' or '.join(kinds)}, but is {came!r}.{_hint(came, rest)}"


def _kind(text: str) -> str:
    """Return `a whole number` for "<class 'int'>", `one of 'a', 'b'` for a Literal, and so on."""
    if text in _WORDS:
        return _WORDS[text]
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", text)
    if literal:
        return f"one of {literal[1]}"
    named = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", text)
    return named[1] if named else text.replace("typing.", "")


def _hint(came: str, rest: str) -> str:
    """Return the nearest of the values that a Literal allows."""
    choices = [
        choice
        for literal in re.findall(r"Literal\[(.*?)\]", rest)
        for choice in re.findall(r"'([^']+)'", literal)
    ]
    near = difflib.get_close_matches(came, choices, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _nearest(key: str, known: list[str]) -> str | None:
    """Return the known key that `key` most likely means: `devices` is `trainer.devices`."""
    last = key.rpartition(".")[2]
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    if same_end:
        return same_end[0]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return near[0]
    ends = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return ends[near[0]] if near else None
