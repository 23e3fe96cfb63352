"""Suites of tasks: where images come from, how they are split, and how they are fed."""

from mergekit_lit.data import embedded, vision

__all__ = ["embedded", "vision"]
