"""This file measures where the stability of experts can be measured, and what it predicts.

    python experiments/stability.py experiments/stability.yaml --backbones vit --out runs/stability

Trains each configuration with twins (`StabilityTwins`), one trajectory for all step counts, and
prints two tables: the measured distances beside the floor of rounding and the path estimate, and
rank correlations with the gap between test and training loss. What is there is not made again.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import load_expert
from mergekit_lit.core.files import read_json, write_json
from mergekit_lit.core.measurements import read_measurements
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.train import train_expert


@dataclass(frozen=True)
class Run:
    """One configuration of one task, backbone and seed."""

    backbone: str
    suite: str
    task: str
    seed: int
    steps: tuple[int, ...]
    twins: int
    replaced: tuple[int, ...]
    lr: float
    batch: int
    train_share: float
    out: Path

    @property
    def name(self) -> str:
        """Name of its folder."""
        share = "" if self.train_share == 1 else f"-share{self.train_share:g}"
        return f"{self.task}-lr{self.lr:g}-b{self.batch}{share}-{self.seed}"


@dataclass(frozen=True)
class Row:
    """What one expert shows: distances and what they might predict."""

    run: str
    steps: int
    card: Card
    eps2: Mapping[int, float]
    each: Mapping[int, Sequence[float]]
    rounding: float
    gap: float


def main() -> None:
    """Make what is missing, and print the tables of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, steps, configurations ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="in place of the file's")
    parser.add_argument("--tasks", nargs="+", help="in place of the file's")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {k: v for k in ("suite", "backbones", "tasks") if (v := getattr(given, k))}
    for backbone in settings["backbones"]:
        runs = list(runs_of(settings, backbone, given.out))
        with Crew(given.jobs) as crew:
            crew.run(make, runs)
        rows = [row for run in runs for row in rows_of(run)]
        print(f"\n### {backbone}\n\n{distances(rows)}\n\n{correlations(rows)}", flush=True)


def runs_of(settings: Mapping[str, Any], backbone: str, out: Path) -> Iterator[Run]:
    """Yield every run of a backbone."""
    for task in settings["tasks"]:
        for configuration in settings["configurations"]:
            for seed in settings["seeds"]:
                yield Run(
                    backbone=backbone,
                    suite=settings["suite"],
                    task=task,
                    seed=seed,
                    steps=tuple(settings["steps"]),
                    twins=settings["twins"],
                    replaced=tuple(settings["replaced"]),
                    out=out / backbone.replace("/", "-"),
                    **{"train_share": 1.0, **configuration},
                )


def make(run: Run) -> Path:
    """Train one run with its twins, and measure the gap of each of its experts."""
    folder = run.out / run.name
    found = folder / "gaps.json"
    if found.is_file():
        return found
    result = train_expert(
        data=TaskDataModule(run.suite, run.task, batch=run.batch, train_share=run.train_share),
        model=ExpertModule(
            run.backbone, lr=run.lr, schedule="constant", warmup_steps=0, seed=run.seed
        ),
        steps=run.steps,
        out=folder,
        trainer={"accelerator": "cpu"},
        callbacks=[StabilityTwins(twins=run.twins, replaced=run.replaced, every=10)],
        resume=True,
    )
    write_json(found, {str(path): gap_of(path, run) for path in result.experts})
    print(found, flush=True)
    return found


def gap_of(path: Path, run: Run) -> dict[str, float]:
    """Return test and training loss of an expert on its own task."""
    data = TaskDataModule(run.suite, run.task, train_share=run.train_share)
    data.setup()
    backbone, _ = load_base_of([path])
    losses = {}
    for split in ("train", "test"):
        table = evaluate_models(
            backbone, {"expert": [load_expert(path)]}, [data.task_data], split=split
        )
        losses[split] = table["expert"]["tasks"][run.task]["loss"]
    return {**losses, "gap": losses["test"] - losses["train"]}


def rows_of(run: Run) -> Iterator[Row]:
    """Yield one row for each step count."""
    gaps = read_json(run.out / run.name / "gaps.json")
    for file, losses in gaps.items():
        card = load_expert(Path(file)).card
        stability = read_measurements(Path(file))["stability"]
        replaced = stability["replaced"]
        yield Row(
            run=run.name,
            steps=card.steps or 0,
            card=card,
            eps2={int(m): found["backbone"]["mean"] for m, found in replaced.items()},
            each={int(m): found["each"] for m, found in replaced.items()},
            rounding=stability["rounding"],
            gap=losses["gap"],
        )


def distances(rows: Sequence[Row]) -> str:
    """Return a table of eps by number of replaced samples, beside rounding and path estimate."""
    numbers = sorted(rows[0].eps2)
    heads = [f"eps, m = {m}" for m in numbers]
    lines = [
        f"| run | K | {' | '.join(heads)} | rounding | eps_path | over the length of the way |",
        "|---" * (len(numbers) + 5) + "|",
    ]
    for row in rows:
        eps = [f"{row.eps2[m] ** 0.5:.3g}" for m in numbers]
        path = "" if row.card.eps_path is None else f"{row.card.eps_path:.3g}"
        share = row.eps2[numbers[0]] ** 0.5 / (row.card.displacement or 1.0)
        floor = f"{row.rounding**0.5:.2g}"
        cells = [row.run, str(row.steps), *eps, floor, path, f"{share:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def correlations(rows: Sequence[Row]) -> str:
    """Return Spearman's rank correlations with the gap, of stability and of what needs none.

    Only experts whose distance stands ten times above rounding count for measured stability.
    """
    from scipy.stats import spearmanr

    least = min(rows[0].eps2)
    known = [r for r in rows if r.eps2[least] >= 100 * r.rounding and r.card.displacement]
    predictors = {
        f"eps, m = {least}": [r.eps2[least] for r in known],
        "eps_path": [r.card.eps_path or 0.0 for r in known],
        "K eta": [(r.card.steps or 0) * (r.card.lr or 0.0) for r in known],
        "length of the way": [r.card.displacement or 0.0 for r in known],
        "training accuracy": [r.card.train_accuracy or 0.0 for r in known],
    }
    gaps = [r.gap for r in known]
    lines = [
        f"{len(known)} of {len(rows)} experts stand above rounding.\n",
        "| predictor | Spearman with the gap |",
        "|---|---|",
    ]
    for name, values in predictors.items():
        # A rank correlation needs values that differ.
        differ = len(set(values)) > 1 and len(set(gaps)) > 1
        told = f"{float(spearmanr(values, gaps).statistic):.2f}" if differ else "-"
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
