"""Merge methods, one pure function each, and the engine that runs them."""

from mergekit_lit.merging.engine import merge, merge_many
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.listing import methods_table
from mergekit_lit.merging.methods.alignment import git_rebasin
from mergekit_lit.merging.methods.arithmetic import lines, metagpt, task_arithmetic
from mergekit_lit.merging.methods.averaging import average, travel_normalised, weighted_average
from mergekit_lit.merging.methods.curvature import mats
from mergekit_lit.merging.methods.descent import wudi
from mergekit_lit.merging.methods.dropping import dare, della
from mergekit_lit.merging.methods.fisher import fisher
from mergekit_lit.merging.methods.masks import consensus, emr, tall_masks
from mergekit_lit.merging.methods.regression import regmean, regmean_plus_plus
from mergekit_lit.merging.methods.repair import repair
from mergekit_lit.merging.methods.selection import nearswap, pcb, ram, sce
from mergekit_lit.merging.methods.soups import greedy_soup
from mergekit_lit.merging.methods.sparsify import breadcrumbs, magmax, ties
from mergekit_lit.merging.methods.spectral import iso_c, iso_cts, knots, tsv_m
from mergekit_lit.merging.methods.spherical import karcher, model_stock, multislerp, nuslerp, slerp
from mergekit_lit.merging.methods.surgery import surgery
from mergekit_lit.merging.methods.test_time import adamerging
from mergekit_lit.merging.methods.veneers import equal_norms
from mergekit_lit.merging.methods.zipping import zipit
from mergekit_lit.merging.patterns import select
from mergekit_lit.merging.plan import plan
from mergekit_lit.merging.raw import load_raw, save_raw

__all__ = [
    "adamerging",
    "average",
    "breadcrumbs",
    "consensus",
    "dare",
    "della",
    "emr",
    "equal_norms",
    "fisher",
    "git_rebasin",
    "greedy_soup",
    "in_memory",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "lines",
    "load_experts",
    "load_raw",
    "magmax",
    "mats",
    "merge",
    "merge_many",
    "metagpt",
    "methods_table",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "pcb",
    "plan",
    "ram",
    "regmean",
    "regmean_plus_plus",
    "repair",
    "save_raw",
    "sce",
    "select",
    "slerp",
    "surgery",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "travel_normalised",
    "tsv_m",
    "weighted_average",
    "wudi",
    "zipit",
]
