"""Measure what the records of a large sweep cost to load, with the index and without, and its page.

The records are made up: rates, decays, seeds and tasks in a grid, with every setting that a real
record of training has.

    python experiments/benchmarks/results.py --runs 10000
"""

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.records import Record, plain
from mergekit_lit.reports.index import INDEX, load_entries
from mergekit_lit.stages.report import build_report

TARGET_S = 2.0


def main() -> None:
    """Print seconds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="records of the sweep")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind, in turns")
    parser.add_argument("--folder", type=Path, help="where it is kept; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        write_sweep(folder, given.runs)
        print(f"{given.runs} records")
        _print("first load, which makes the index", [_seconds(lambda: load_entries(folder))])
        plain_s, indexed_s = [], []
        for _ in range(given.repeats):
            plain_s.append(_seconds(lambda: load_entries(folder, index=False)))
            indexed_s.append(_seconds(lambda: load_entries(folder)))
        _print("all records, without the index", plain_s)
        _print(f"with the index (target: {TARGET_S * given.runs / 10_000:.1f} s)", indexed_s)
        _run(folder, 0, (0.5, 0.0, 0, "task 0"), random.Random(1))
        _print("with the index, after one record changed", [_seconds(lambda: load_entries(folder))])
        _print("whole report", [_seconds(lambda: build_report(folder))])
        for name in (INDEX, "report.html"):
            print(f"{name}: {(folder / name).stat().st_size / 1e6:.2f} MB")


def write_sweep(folder: Path, runs: int) -> None:
    """Write `runs` records of training, as a sweep of 20 tasks leaves them."""
    draw = random.Random(0)
    tasks = [f"task {index}" for index in range(20)]
    decays, seeds = (0.0, 1e-4, 1e-3, 1e-2), range(5)
    rates = [1e-3 * 1.2**index for index in range(math.ceil(runs / 400))]
    grid = itertools.product(rates, decays, seeds, tasks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text("job: train\n")
    for index, point in enumerate(itertools.islice(grid, runs)):
        _run(folder, index, point, draw)


def _run(
    folder: Path, index: int, point: tuple[float, float, int, str], draw: random.Random
) -> None:
    """Write one record, without waiting for the disk, as thousands are written here."""
    lr, decay, seed, task = point
    accuracy = 0.9 - 0.05 * math.log10(lr / 0.02) ** 2 - decay + draw.gauss(0, 0.01)
    card = Card(
        task=task,
        lr=lr,
        weight_decay=decay,
        seed=seed,
        steps=100,
        train_loss=1 - accuracy,
        train_accuracy=accuracy + 0.02,
        val_loss=1 - accuracy,
        val_accuracy=accuracy,
    )
    config: dict[str, Any] = {
        "data": {"task": task, "suite": "made_up", "split_hash": f"{index:064x}", "batch": 64},
        "model": {f"setting_{k}": k for k in range(20)}
        | {"lr": lr, "weight_decay": decay, "seed": seed},
        "steps": [100],
        "trainer": {"world_size": 1, "precision": None},
    }
    record = Record(
        stage="train",
        name=task,
        config=config,
        metrics={"experts": {"expert": card.to_json()}},
        finished="2026-01-01T00:00:00+00:00",
    )
    home = folder / "runs" / f"{index:016x}"
    (home / "logs" / "expert").mkdir(parents=True, exist_ok=True)
    (home / "expert.record.json").write_text(json.dumps(plain(vars(record)), indent=2))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _print(name: str, seconds: list[float]) -> None:
    spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(seconds) > 1 else ""
    print(f"{name}: {statistics.median(seconds):.2f} s{spread}", flush=True)


if __name__ == "__main__":
    main()
