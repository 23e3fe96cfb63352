"""This file measures the quickstart over seeds and backbones, and prints the table of the README.

    python experiments/quickstart_seeds.py --backbones resnet vit --seeds 0 1 2 --out runs/seeds
    python experiments/quickstart_seeds.py --suite FOLDER --tasks cars mnist --out runs/mine

Each run takes minutes on two cores; a run whose record is there is not made again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.reports import tables
from mergekit_lit.reports.intervals import mean_told


def main() -> None:
    """Make the runs that are missing, and print one table a backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--suite", default="embedded8")
    parser.add_argument("--tasks", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    same = {"suite": chosen.suite, "tasks": chosen.tasks, "jobs": chosen.jobs}
    for backbone in chosen.backbones:
        folders = {seed: chosen.out / f"{backbone}-{seed}" for seed in chosen.seeds}
        records = [run(folders[s], backbone=backbone, seed=s, **same) for s in chosen.seeds]
        print(f"\n### {backbone}\n\n{markdown(records)}", flush=True)


def run(out: Path, **settings: Any) -> Record:
    """Return the record of one quickstart, made now if it is not there."""
    path = out / "record.json"
    if not path.is_file():
        # Only here: reading finished runs needs no Lightning.
        from mergekit_lit.search.quickstart import run_quickstart

        run_quickstart(out=out, **settings)
    return Record.read(path)


def markdown(records: Sequence[Record]) -> str:
    """Return a table of means over seeds with 95 % intervals, and what they say.

    The interval is Student's, over seeds: each seed has its own split, order and choice of scale.
    """
    runs = [{row.model: row for row in tables.means(tables.scores(r))} for r in records]
    models = sorted(runs[0], key=lambda model: statistics.fmean(r[model].accuracy for r in runs))
    lines = [
        "| model | data | λ by seed | accuracy | normalised accuracy |",
        "|---|---|---|---|---|",
    ]
    for model in models:
        rows = [found[model] for found in runs]
        scales = "" if rows[0].scale is None else ", ".join(f"{row.scale:g}" for row in rows)
        normalised = [row.normalised for row in rows if row.normalised is not None]
        cells = (
            model,
            rows[0].data or "",
            scales,
            mean_told([row.accuracy for row in rows]),
            mean_told(normalised) if len(normalised) == len(rows) else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_sentences(records, runs)])


def _sentences(records: Sequence[Record], runs: list[dict[str, tables.Score]]) -> list[str]:
    """Return the differences that the quickstart is about, and what each run took."""
    quoted = [tables.headline(tables.means(tables.scores(record))) for record in records]
    best = [row for row in quoted if row is not None]
    above = [row.accuracy - found["base"].accuracy for row, found in zip(best, runs, strict=True)]
    below = [
        found["experts"].accuracy - row.accuracy for row, found in zip(best, runs, strict=True)
    ]
    held = sum(a > 0 and b > 0 for a, b in zip(above, below, strict=True))
    names = ", ".join(row.model for row in best)
    seconds = ", ".join(f"{record.seconds:.0f}" for record in records)
    seeds = json.dumps([record.seeds["seed"] for record in records])
    return [
        f"Base < merge < experts in {held} of {len(runs)} seeds {seeds}. The merge is the best on "
        f"val ({names}). Merge minus base: {mean_told(above)}; experts minus merge: "
        f"{mean_told(below)}. Seconds: {seconds}.",
    ]


if __name__ == "__main__":
    main()
