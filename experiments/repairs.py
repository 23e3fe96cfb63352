"""This file measures what repairs do for merges that one expert spoils by having gone too far.

    python experiments/repairs.py experiments/repairs.yaml --backbones vit --seeds 0

Takes the experts of `experiments/hyperparameters.py`, trains those that are missing, and merges
random groups of which one member was trained for longer, or faster, than the others:

- `alike`: all members as the others; what there is to win.
- `before`: as they are.
- `equal norms`: the veneer that rescales all deltas to their mean length; `shortest norm`: to that
  of the shortest.
- `travel`: `travel_normalised`, beside the average alone.
- `shorter`: the odd member's own checkpoint whose travel is nearest to the others'.
- `distilled`: a student of the odd member, trained as the others are.

Each is scored on a few test images of each task; nothing is tuned. Each case ends in one record.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finished import stem_of
from heterogeneous import configured
from hyperparameters import experts_of
from hyperparameters_runs import Run, runs_of, sweep_of
from omegaconf import OmegaConf
from testbed import POLICY, Recorded, groups_of, trained, write_rows

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import read_json
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.reports.intervals import mean_told
from mergekit_lit.stages.advice import nearest_travel
from mergekit_lit.stages.recipes import Recipe

_TRAVEL = "travel_normalised"


@dataclass(frozen=True)
class Case(Recorded):
    """How the odd member and the others of some groups were trained, and what merges them."""

    name: str
    others: Run
    one: Run
    steps: tuple[int, int]
    groups: tuple[tuple[str, ...], ...]
    odd: int
    methods: tuple[Mapping[str, Any], ...]
    out: Path

    @property
    def record(self) -> Path:
        """Where its record lies, once it is made."""
        run = self.others
        folder = f"{run.backbone.replace('/', '-')}-{run.seed}"
        return self.out / folder / f"{stem_of(self.name)}.json"


def main() -> None:
    """Measure what is missing, and print a table for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the sweep's")
    parser.add_argument("--experts", type=Path, default=Path("runs/hyperparameters"))
    parser.add_argument("--out", type=Path, default=Path("runs/repairs"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    sweep = sweep_of(given.file.parent / settings["sweep"])
    sweep |= {"seeds": given.seeds} if given.seeds else {}
    cases = cases_of(settings, runs_of(sweep, given.experts), given.out)
    for backbone in given.backbones:
        own = [case for case in cases if case.others.backbone == backbone]
        rows = [row for case in own for row in read_json(make(case))["metrics"]["rows"]]
        print(f"\n### {backbone}\n\n{table(rows)}", flush=True)


def cases_of(settings: Mapping[str, Any], runs: Sequence[Run], out: Path) -> list[Case]:
    """Return every case of a file, of each seed and backbone of the sweep's runs."""
    found = []
    for seed, backbone in dict.fromkeys((run.seed, run.backbone) for run in runs):
        own = [run for run in runs if (run.seed, run.backbone) == (seed, backbone)]
        sizes = settings["groups"].items()
        groups = tuple(g for size, count in sizes for g in groups_of(own[0].tasks, size, count))
        for name, of in settings["cases"].items():
            pair = [configured(own, of[side]) for side in ("others", "one")]
            steps = (of["others"]["steps"], of["one"]["steps"])
            methods = tuple(settings["methods"])
            found.append(Case(name, *pair, steps, groups, settings["odd"], methods, out))
    return found


def make(case: Case) -> Path:
    """Measure one case, and write its record; a finished one is left."""
    return write_rows(
        case.record,
        lambda: rows_of(case),
        stage="repairs",
        name=case.name,
        config=case.config,
        seeds={"seed": case.others.seed},
    )


def rows_of(case: Case) -> Iterator[dict[str, Any]]:
    """Yield a row for each group, odd member, method and repair."""
    run, bed = case.others, case.others.testbed
    others, one = experts_of(case.others)[case.steps[0]], experts_of(case.one)
    for group in case.groups:
        places = [run.tasks.index(task) for task in group]
        for odd in range(case.odd):
            alike = [others[place] for place in places]
            before = [*alike]
            before[odd] = one[case.steps[1]][places[odd]]
            travel = statistics.median(load_expert(file).card.travel or 0.0 for file in alike)
            path = {k: files[places[odd]] for k, files in one.items() if k <= case.steps[1]}
            distilled = [*alike]
            distilled[odd] = student_of(case, group[odd], before[odd])
            shorter = [*alike]
            shorter[odd] = path[nearest_travel({k: _travel(f) for k, f in path.items()}, travel)]
            for chosen in case.methods:
                for repair, files, recipe in repairs(
                    alike, before, {"shorter": shorter, "distilled": distilled}, chosen
                ):
                    experts = bed.experts(files)
                    merged = bed.merged(experts, recipe)
                    scores = bed.scores({"merged": merged}, experts, split="test")["merged"]
                    yield {
                        "backbone": run.backbone,
                        "seed": run.seed,
                        "case": case.name,
                        "group": "+".join(group),
                        "odd": group[odd],
                        "method": chosen["method"],
                        "repair": repair,
                        "accuracy": statistics.fmean(s["accuracy"] for s in scores.values()),
                        "own": scores[group[odd]]["accuracy"],
                    }


def student_of(case: Case, task: str, teacher: Path) -> Path:
    """Return a student of an expert, trained as the others of its group are."""
    run, steps = case.others, case.steps[0]
    made = trained(
        TaskDataModule(
            run.suite, task, batch=run.batch, train_share=run.train_share, split_seed=run.seed
        ),
        ExpertModule(
            run.backbone,
            lr=run.lr,
            schedule=run.schedule,  # type: ignore[arg-type] # checked there
            warmup_steps=run.warmup_steps,
            teacher=str(teacher),
            seed=run.seed,
        ),
        steps=[steps],
        out=case.record.with_suffix("") / "students",
        name=task,
    )
    return made[steps]


def repairs(
    alike: Sequence[Path],
    before: Sequence[Path],
    again: Mapping[str, Sequence[Path]],
    chosen: Mapping[str, Any],
) -> Iterator[tuple[str, Sequence[Path], Recipe]]:
    """Yield each repair of a merge: its name, the experts, and how they are merged."""
    config = chosen.get("config", {})

    def recipe(*veneers: tuple[str, dict[str, Any]]) -> Recipe:
        return Recipe(method=chosen["method"], config=config, veneers=veneers, batch_norm=POLICY)

    yield "alike", alike, recipe()
    yield "before", before, recipe()
    yield "equal norms", before, recipe(("equal_norms", {"to": "mean"}))
    yield "shortest norm", before, recipe(("equal_norms", {"to": "min"}))
    if chosen["method"] == "average":
        yield "travel", before, Recipe(method=_TRAVEL, batch_norm=POLICY)
    for name, experts in again.items():
        yield name, experts, recipe()


def _travel(file: Path) -> float:
    return load_expert(file).card.travel or 0.0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracies, and how far each lies above `before`, in points."""
    lines = ["| case | method | repair | accuracy | beside before | odd task |", "|" + "---|" * 6]
    for key in dict.fromkeys((row["case"], row["method"], row["repair"]) for row in rows):
        of = _of(rows, *key)
        plain = _of(rows, key[0], key[1], "before")
        gains = [
            100 * (row["accuracy"] - other["accuracy"])
            for row, other in zip(of, plain, strict=True)
        ]
        own = [100 * (row["own"] - other["own"]) for row, other in zip(of, plain, strict=True)]
        mean = statistics.fmean(row["accuracy"] for row in of)
        lines.append(f"| {' | '.join([*key, f'{mean:.3f}', _told(gains), _told(own)])} |")
    return "\n".join(lines)


def _of(
    rows: Sequence[Mapping[str, Any]], case: str, method: str, repair: str
) -> list[Mapping[str, Any]]:
    names = ("case", "method", "repair")
    return [row for row in rows if tuple(row[n] for n in names) == (case, method, repair)]


def _told(values: Sequence[float]) -> str:
    """Return a mean with Student's 95 % interval over groups and odd members."""
    return mean_told(values if any(values) else values[:1], "+.1f")


if __name__ == "__main__":
    main()
