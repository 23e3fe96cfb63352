"""This file measures what merging costs: `mergekit-lit merge`, other tools, and the floor.

    python experiments/benchmarks/merge_speed.py --folder FOLDER --peers PYTHON
    python experiments/benchmarks/merge_speed.py --folder FOLDER --model resnet50 --experts 8

The floor is to read all inputs from a warm page cache and to write the output. Experts are timm's
ViT-B/32 (or another model) in float32 with small made-up deltas; FOLDER needs 3.2 GB for 8 of them,
7.4 GB for 20. PYTHON is an interpreter with mergekit or fusion-bench installed. Every run is a
process of its own; runs of all tools take turns.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from merge_speed_experts import write_experts
from merge_speed_runs import installed, measure
from merge_speed_tools import FUSION_BENCH, MERGEKIT, SVD

METHODS = ("average", "task_arithmetic", "ties", "dare", "magmax", "tsv_m", "iso_c", "wudi")


def main() -> None:
    """Write the experts, run everything in turns, print the table, remove the experts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="vit_base_patch32_224")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[], help="pythons that have other tools")
    parser.add_argument("--skip", nargs="*", default=[], help="tools that are not run")
    parser.add_argument("--svd", action="store_true", help="compare with torch.linalg.svd")
    parser.add_argument("--grid", action="store_true", help="merge under ten densities, too")
    parser.add_argument("--memory", type=float, default=12.0, help="GB that other tools may take")
    parser.add_argument("--keep", action="store_true", help="leave the experts in the folder")
    chosen = parser.parse_args()
    files = write_experts(chosen.folder, chosen.model, chosen.experts)
    try:
        results = measure(jobs_of(chosen, files), chosen.repeats, chosen.memory)
    finally:
        for file in [] if chosen.keep else chosen.folder.glob("*.safetensors"):
            file.unlink()
    print(table(results))
    (chosen.folder / "merge_speed.json").write_text(json.dumps(results, indent=1))


def jobs_of(chosen: argparse.Namespace, files: list[str]) -> list[dict[str, Any]]:
    """Return what to run: tool, interpreter, method, and files."""
    tools = [("mergekit-lit", METHODS)]
    tools += [("ten densities", ("ties",))] if chosen.grid else []
    tools += [("svd float32", SVD), ("svd float64", SVD)] if chosen.svd else []
    known = [(sys.executable, tools)]
    for python in chosen.peers:
        others = [("mergekit", tuple(MERGEKIT)), ("fusion_bench", FUSION_BENCH)]
        known.append((python, [other for other in others if installed(python, other[0])]))
    same = {"files": files, "out": str(chosen.folder / "merged.safetensors"), "model": chosen.model}
    return [{"tool": "floor", "python": sys.executable, "method": "", **same}] + [
        {"tool": tool, "python": python, "method": method, **same}
        for method in chosen.methods
        for python, tools in known
        for tool, methods in tools
        if method in methods and tool not in chosen.skip
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: medians, and lowest and highest processor time."""
    floor = median(results[0]["runs"], "cpu_s")
    own = {
        job["method"]: job["runs"]
        for job in results
        if job["tool"] == "mergekit-lit" and job["runs"]
    }
    headings = ["method", "tool", "CPU s (lowest to highest)", "over the floor", "over ours"]
    headings += ["CPU s of the process", "over ours", "wall s", "anonymous MB"]
    rows = [headings, ["---"] * len(headings)]
    rows += [cells(job, floor, own.get(job["method"], [])) for job in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(job: dict[str, Any], floor: float, own: list[dict[str, Any]]) -> list[str]:
    """Return one row of the table."""
    runs = job["runs"]
    if not runs:
        return [job["method"], job["tool"], f"failed: {job['failed']}", *[""] * 6]
    name = job["tool"]
    name += f" {runs[0]['version']}" if name.startswith(("mergekit", "fusion")) else ""
    each, cpu_s = [run["cpu_s"] for run in runs], median(runs, "cpu_s")
    return [
        job["method"] or "-",
        name,
        f"{cpu_s:.2f} ({min(each):.2f} to {max(each):.2f})",
        f"{cpu_s / floor:.2f}",
        f"{cpu_s / median(own, 'cpu_s'):.2f}" if own else "",
        f"{median(runs, 'process_s'):.2f}",
        f"{median(runs, 'process_s') / median(own, 'process_s'):.2f}" if own else "",
        f"{median(runs, 'wall_s'):.2f}",
        f"{median(runs, 'anonymous_mb'):.0f}",
    ]


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main()
