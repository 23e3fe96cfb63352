"""Measure what ten merges in one pass cost over one: grids of scales, densities and drops.

    python experiments/benchmarks/grids.py runs/seeds/vit-0/*.safetensors

Experts are held in memory, so that nothing is read twice either way; nothing is written.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_lit.core.experts import Experts
from mergekit_lit.merging.engine import merge_many
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.stages.opening import load_base_of

GRIDS: Mapping[str, tuple[str, Sequence[float]]] = {
    "task_arithmetic": ("scale", [0.05 * k for k in range(1, 11)]),
    "ties": ("density", [0.1 * k for k in range(1, 11)]),
    "dare": ("drop", [0.09 * k for k in range(1, 11)]),
    "pcb": ("density", [0.1 * k for k in range(1, 11)]),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experts", nargs="+", type=Path, help="expert files of one base")
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=5, help="one merge and ten, in turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    _, base = load_base_of(given.experts, None)
    experts = in_memory(load_experts(given.experts, base=base))
    print("| method | of | one merge, CPU s | ten in one pass | merges (lowest to highest) |")
    print("|---|---|---|---|---|")
    for method in given.methods:
        name, values = GRIDS[method]
        seconds(experts, method, [{name: values[4]}])  # what a first call loads
        pairs = [
            (
                seconds(experts, method, [{name: values[4]}]),
                seconds(experts, method, [{name: value} for value in values]),
            )
            for _ in range(given.rounds)
        ]
        one, ten = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(many / single for single, many in pairs)
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        print(f"| {method} | {name} | {one:.2f} | {ten:.2f} | {spread} |", flush=True)


def seconds(experts: Experts, method: str, configs: Sequence[Mapping[str, Any]]) -> float:
    """Return the processor time of merges in one pass, each dropped once it is made."""
    started = time.process_time()
    for _ in merge_many(experts, method, configs):
        pass
    return time.process_time() - started


if __name__ == "__main__":
    main()
