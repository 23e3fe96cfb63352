"""Merge methods, one pure function each, and the engine that runs them."""

from mergekit_lit.merging.arithmetic import task_arithmetic
from mergekit_lit.merging.averaging import average, travel_normalised, weighted_average
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.listing import methods_table
from mergekit_lit.merging.sparsify import dare, magmax, ties
from mergekit_lit.merging.spectral import iso_c, iso_cts, tsv_m

__all__ = [
    "average",
    "dare",
    "in_memory",
    "iso_c",
    "iso_cts",
    "load_experts",
    "magmax",
    "merge",
    "methods_table",
    "task_arithmetic",
    "ties",
    "travel_normalised",
    "tsv_m",
    "weighted_average",
]
