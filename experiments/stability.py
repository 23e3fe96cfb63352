"""This file measures where the stability of experts can be measured, and what it predicts.

    python experiments/stability.py experiments/stability.yaml --backbones vit --out runs/stability

Trains each configuration with twins (`StabilityTwins`), one trajectory for all step counts, scores
the experts, their plain average and the base, and prints tables: the measured distances beside the
floor of rounding and the path estimate, and rank correlations with the gap between test and
training loss, of experts and of merges. One row an expert goes to `<out>/<file>.csv`. What is there
is not made again.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from stability_exponents import exponents, flat, plots
from stability_tables import calibration, distances, ranks
from testbed import POLICY, Place, Testbed, csv_of, testbed_of, trained, write_rows

from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import read_json, write_text
from mergekit_lit.core.measurements import read_measurements
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.reports.curves import sheet
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.recipes import Recipe


@dataclass(frozen=True)
class Run:
    """One configuration of one backbone and seed, for all tasks."""

    backbone: str
    suite: str
    tasks: tuple[str, ...]
    seed: int
    images: int
    steps: tuple[int, ...]
    twins: tuple[int, ...]
    replaced: tuple[int, ...]
    lr: float
    batch: int
    train_share: float
    export: bool
    out: Path

    @property
    def name(self) -> str:
        """Name of the configuration."""
        share = "" if self.train_share == 1 else f"-share{self.train_share:g}"
        return f"lr{self.lr:g}-b{self.batch}{share}-{self.seed}"

    @property
    def record(self) -> Path:
        """Where its scores lie, once they are made."""
        return self.out / f"{self.name}.json"

    def data(self, task: str) -> TaskDataModule:
        """Return the images that experts of a task are trained on."""
        return TaskDataModule(self.suite, task, batch=self.batch, train_share=self.train_share)


def main() -> None:
    """Make what is missing, and print the tables of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, configurations ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="in place of the file's")
    parser.add_argument("--tasks", nargs="+", help="in place of the file's")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--figures", type=Path, help="folder of the figures; none without it")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {k: v for k in ("suite", "backbones", "tasks") if (v := getattr(given, k))}
    everyone: list[dict[str, Any]] = []
    for backbone in settings["backbones"]:
        runs = list(runs_of(settings, backbone, given.out))
        with Crew(given.jobs) as crew:
            crew.run(make, runs)
        rows = [row for run in runs for row in read_json(run.record)["metrics"]["rows"]]
        everyone += [{**row, "backbone": backbone} for row in rows]
        tables = [distances(rows), exponents(rows), calibration(rows), ranks(rows)]
        print("\n\n".join([f"\n### {backbone}", *tables]), flush=True)
        if given.figures:
            place = given.figures / f"stability_{backbone.replace('/', '-')}.svg"
            write_text(place, sheet(f"Stability of {backbone} experts, by rate", plots(rows)))
    first = ("backbone", "task", "lr", "batch", "train_share", "n", "seed", "steps")
    write_text(given.out / f"{given.file.stem}.csv", csv_of(list(flat(everyone)), first))


def runs_of(settings: Mapping[str, Any], backbone: str, out: Path) -> Iterator[Run]:
    """Yield every run of a backbone."""
    for configuration in settings["configurations"]:
        for seed in settings["seeds"]:
            chosen = {"train_share": 1.0, "export": False, **configuration}
            yield Run(
                backbone=backbone,
                suite=settings["suite"],
                tasks=tuple(settings["tasks"]),
                seed=seed,
                images=settings["images"],
                twins=tuple(settings["twins"]),
                replaced=tuple(settings["replaced"]),
                out=out / backbone.replace("/", "-"),
                **{**chosen, "steps": tuple(chosen["steps"])},
            )


def make(run: Run) -> Path:
    """Train the experts of one configuration with their twins, and write their scores."""
    return write_rows(
        run.record,
        lambda: rows_of(run, [train(run, task) for task in run.tasks]),
        stage="stability",
        name=run.name,
        config={**asdict(run), "batch_norm": POLICY},
        seeds={"seed": run.seed},
    )


def train(run: Run, task: str) -> tuple[Path, ...]:
    """Train one run with its twins, and return its experts by step count."""
    # That a twin with nothing replaced stays where the run is, the tests show.
    twins = StabilityTwins(
        twins=run.twins, replaced=run.replaced, null=False, every=10, export=run.export
    )
    made = trained(
        run.data(task),
        ExpertModule(run.backbone, lr=run.lr, schedule="constant", warmup_steps=0, seed=run.seed),
        steps=run.steps,
        out=run.out / f"{task}-{run.name}",
        callbacks=[twins],
    )
    return tuple(made.values())


def rows_of(run: Run, files: Sequence[Sequence[Path]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each step count: of every expert, and of their average.

    Args:
        run: the configuration.
        files: of each task, an expert for each step count.
    """
    bed = testbed_of(
        Place(
            backbone=run.backbone,
            suite=run.suite,
            seed=run.data(run.tasks[0]).options.seed,
            train_share=run.train_share,
            images=run.images,
        )
    )
    for steps, paths in zip(run.steps, zip(*files, strict=True), strict=True):
        experts = bed.experts(paths)
        merged = bed.merged(experts, Recipe(batch_norm=POLICY))
        alone = [load_expert(path) for path in paths]
        gaps = {
            "expert": gaps_of(bed, alone, experts),
            "merged": gaps_of(bed, merged, experts),
            "base": gaps_of(bed, bed.base, experts),
        }
        yield {
            **{name: getattr(run, name) for name in ("lr", "batch", "train_share", "seed")},
            "steps": steps,
            "experts": {
                task: measured_of(path) for task, path in zip(run.tasks, paths, strict=True)
            },
            "gaps": gaps,
        }


def gaps_of(bed: Testbed, model: Any, experts: Any) -> dict[str, float]:
    """Return test less training loss of a model on each task."""
    train, test = (
        bed.scores({"model": model}, experts, split=split)["model"] for split in ("train", "test")
    )
    return {task: test[task]["loss"] - train[task]["loss"] for task in train}


def measured_of(path: Path) -> dict[str, Any]:
    """Return what an expert's twins and card tell: squared distances by replaced samples."""
    card, stability = load_expert(path).card, read_measurements(path)["stability"]
    return {
        "eps2": {m: found["backbone"]["mean"] for m, found in stability["replaced"].items()},
        "each": {m: found["each"] for m, found in stability["replaced"].items()},
        "above": {m: found["above_rounding"] for m, found in stability["replaced"].items()},
        "rounding": stability["rounding"],
        "eps_path": card.eps_path,
        "displacement": card.displacement,
        "train_accuracy": card.train_accuracy,
        "n": card.n,
    }


if __name__ == "__main__":
    main()
