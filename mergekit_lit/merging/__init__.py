"""Merge methods, one pure function each, and the engine that runs them."""

from mergekit_lit.merging.arithmetic import task_arithmetic
from mergekit_lit.merging.averaging import average, travel_normalised, weighted_average
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.listing import methods_table

__all__ = [
    "average",
    "in_memory",
    "load_experts",
    "merge",
    "methods_table",
    "task_arithmetic",
    "travel_normalised",
    "weighted_average",
]
