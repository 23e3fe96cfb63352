"""Whether the initialisation helps: python experiments/benchmarks/initialisation.py.

Each task of a suite is fine-tuned from the shipped initialisation and from scratch, by one recipe,
with trained heads. Prints a table of test accuracies in Markdown; the record, by default
runs/initialisation/<backbones>.json, holds every run with the hashes of its base and its images.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import score
from mergekit_lit.stages.train import train_expert

FOLDER = Path("runs") / "initialisation"
ARMS = ("from scratch", "from the initialisation")


class Outcome(NamedTuple):
    """Test accuracies by task and arm, one a seed; hashes of the bases and the training images."""

    accuracies: dict[str, dict[str, list[float]]]
    inputs: dict[str, str]


def main() -> None:
    """Parse the arguments, train, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--suite", default="embedded8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.03, help="of SGD with momentum 0.9, cosine")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", help="some tasks of the suite; all by default")
    parser.add_argument("--out", type=Path, help=f"record; by default in {FOLDER}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stopwatch = Stopwatch()
    found: dict[str, Outcome] = {}
    for backbone in options.backbones:
        found[backbone] = measure(backbone, options)
        print("\n".join(table(backbone, found[backbone].accuracies)), flush=True)
    record = Record(
        stage="train",
        name="initialisation",
        config={name: value for name, value in vars(options).items() if name != "out"},
        inputs={name: text for outcome in found.values() for name, text in outcome.inputs.items()},
        seeds={f"run {index}": seed for index, seed in enumerate(options.seeds)},
        metrics={backbone: outcome.accuracies for backbone, outcome in found.items()},
    )
    out = options.out or FOLDER / f"{'_'.join(options.backbones)}.json"
    stopwatch.finish(record).write(out)
    print(f"record: {out}")


def measure(backbone: str, options: argparse.Namespace) -> Outcome:
    """Train every task from both starts with every seed."""
    found = Outcome({}, {})
    suite = load_suite(options.suite)
    for task in [suite.task(name).name for name in options.tasks or suite.names]:
        rows: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for seed in options.seeds:
            for arm, base in zip(ARMS, (f"{backbone}@random:{seed}", backbone), strict=True):
                reached, inputs = accuracy(base, task, seed, options)
                rows[arm].append(reached)
                found.inputs.update(inputs)
        print(backbone, task, rows, flush=True)
        found.accuracies[task] = rows
    return found


def accuracy(
    base: str, task: str, seed: int, options: argparse.Namespace
) -> tuple[float, dict[str, str]]:
    """Return the test accuracy of one expert, and the hashes of what it was made from."""
    data = TaskDataModule(options.suite, task, batch=options.batch)
    model = ExpertModule(base, head="trained", lr=options.lr, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        train_expert(data=data, model=model, steps=[options.steps], out=Path(folder))
    reached = score(model.backbone.eval(), model.head, data.task_data.test).accuracy
    if reached is None:
        raise ValueError(f"Task {task!r} must have test images, but has none.")
    hashes = {base: model.base.content, f"{options.suite}/{task}": data.task_data.split_hash}
    return reached, hashes


def table(backbone: str, found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a Markdown table: mean over seeds, range in brackets, and the gain."""
    lines = [f"| {backbone} | {ARMS[0]} | {ARMS[1]} | gain |", "|---|---|---|---|"]
    gains = []
    for task, rows in found.items():
        scratch, tuned = (statistics.mean(rows[arm]) for arm in ARMS)
        gains.append(tuned - scratch)
        cells = [f"{statistics.mean(rows[a]):.3f} {spread(rows[a])}".strip() for a in ARMS]
        lines.append(f"| {task} | {cells[0]} | {cells[1]} | {tuned - scratch:+.3f} |")
    better = sum(gain > 0 for gain in gains)
    lines.append(
        f"| mean; better on | | {better} of {len(gains)} tasks | {statistics.mean(gains):+.3f} |"
    )
    return lines


def spread(values: list[float]) -> str:
    """Return lowest and highest, if there are several."""
    return f"({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""


if __name__ == "__main__":
    main()
