"""This file measures what merging experts of different bases costs, beside what was predicted.

    python experiments/pretraining/pretrain.py --backbone resnet --seed 1 --out runs/away
    python experiments/initialisations.py --away runs/away/resnet.safetensors

Trains an expert of each task from each of several bases: `home`, the shipped one; `away`, one that
was pretrained by itself; and `near`, the shipped one tuned further. Pairs and groups of experts are
merged within a base and across two, by each way that `mergekit-lit predict` compares. What it says
beforehand, from weights and from validation images, stands in one row with what test images say.
Each seed and base ends in one record; a finished one is left.

The regret of a verdict is at the size of one network: the best of all ways to merge and of the
single network, on test images, less what the verdict takes; to keep apart takes the single network.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from initialisations_tables import tables
from omegaconf import OmegaConf
from testbed import write_rows

from mergekit_lit.core.expert_files import load_expert, save_base
from mergekit_lit.core.files import read_json, write_text
from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.passes import features_of
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import apply_head
from mergekit_lit.search.predicting.origins import Origins, open_origins
from mergekit_lit.search.predicting.singles import Bench, ByTask, Looked, mean_of
from mergekit_lit.search.predicting.verdict import Way, verdict
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.train import train_expert

HOME, AWAY = "home", "away"

Member = tuple[str, str]
"""Base and task of an expert."""


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    file = Path(__file__).with_suffix(".yaml")
    parser.add_argument("file", type=Path, nargs="?", default=file, help="YAML: tasks, bases ...")
    parser.add_argument("--away", type=Path, help="base file; none leaves that base out")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the file's")
    parser.add_argument("--out", type=Path, default=Path("runs/initialisations"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    for seed in given.seeds or settings["seeds"]:
        for record in Bed(settings, seed, given.away, given.out).records():
            print(record, flush=True)
    rows = [
        row
        for record in sorted(given.out.glob("seed-*/*.json"))
        for row in read_json(record)["metrics"]["rows"]
    ]
    write_text(given.out / "tables.md", tables(rows) + "\n")
    print(tables(rows))


def cases_of(tasks: Sequence[str], base: str) -> list[tuple[Member, ...]]:
    """Return the members of each merge of one base: within home, or across home and another.

    All pairs of tasks, each base's expert the first in every other one, and a group of all tasks:
    within the base, and of each half from either base.
    """
    pairs, half = list(combinations(tasks, 2)), len(tasks) // 2
    within = [tuple((base, task) for task in tasks)]
    if base == HOME:
        return [tuple((HOME, task) for task in pair) for pair in pairs] + within
    ends = ((HOME, base), (base, HOME))
    across = [tuple(zip(ends[i % 2], pair, strict=True)) for i, pair in enumerate(pairs)]
    across += [
        tuple((HOME if task in at_home else base, task) for task in tasks)
        for at_home in (tasks[:half], tasks[::2])
    ]
    return across + within


@dataclass(frozen=True)
class Both:
    """What a network does on validation and on test images."""

    val: ByTask
    test: ByTask


class Bed:
    """The experts of all bases with one seed, and the images that they are scored on."""

    def __init__(
        self, settings: Mapping[str, Any], seed: int, away: Path | None, out: Path
    ) -> None:
        """Name the bases; nothing is trained yet."""
        self._settings, self._seed, self._out = settings, seed, out / f"seed-{seed}"
        self._tasks: list[str] = settings["tasks"]
        home = settings["backbone"]
        self._specs: dict[str, Callable[[], str]] = {HOME: lambda: home}
        if seed in settings["near_seeds"]:
            for steps in settings["near"]["steps"]:
                self._specs[f"near-{steps}"] = partial(self._near, steps)
        if away is not None:
            self._specs[AWAY] = lambda: f"{home}@{away}"
        self.single = cache(self._single)
        self.together = cache(self._together)

    def records(self) -> Iterator[Path]:
        """Yield the record of each base, made where it is missing."""
        for base in self._specs:
            yield write_rows(
                self._out / f"{base}.json",
                partial(self._rows, base),
                stage="initialisations",
                name=base,
                config={**self._settings, "base": base},
                seeds={"seed": self._seed},
            )

    def _rows(self, base: str) -> list[dict[str, Any]]:
        return [self.row(base, members) for members in cases_of(self._tasks, base)]

    def row(self, base: str, members: Sequence[Member]) -> dict[str, Any]:
        """Return what was predicted of one merge, and what test images say."""
        origins = open_origins([self._experts(of)[task] for of, task in members])
        merges = self._merges(origins)
        val, test = (self._looked(members, merges, side) for side in ("val", "test"))
        geometry = {method: origins.geometry(method) for method in merges}
        stretch = {method: geometry[method]["stretch"] for method in merges}
        gains = {method: val.scores(method)["gain"] for method in merges}
        options = {m: test.scores(m)["accuracy"].value for m in merges}
        by_weights = verdict([Way(m, stretch[m]) for m in merges]).method
        by_images = verdict([Way(m, stretch[m], gains[m]) for m in merges]).method
        return {
            "seed": self._seed,
            "base": base,
            "across": len({of for of, _ in members}) > 1,
            "members": [f"{of}:{task}" for of, task in members],
            "apart": next(iter(origins.apart()), None),
            "chance": origins.chance(),
            "kept_apart": mean_of(test.kept, "correct").value,
            "ensemble": self._ensemble(base, [task for _, task in members]),
            "options": {**options, "single": test.accuracy(val.best).value},
            "by_weights": by_weights or "single",
            "by_images": by_images or "single",
            "ways": {
                method: {
                    **geometry[method],
                    "predicted": {k: asdict(v) for k, v in val.scores(method).items()},
                    "measured": {k: v.value for k, v in test.scores(method).items()},
                }
                for method in merges
            },
        }

    def _merges(self, origins: Origins) -> dict[str, Both]:
        """Score every way to merge."""
        bench, tester = self._scorers(origins.experts.names)
        found = {}
        for method, (given, merged_by) in origins.ways().items():
            model = bench.merged(given, merged_by)
            found[method] = Both(bench.scores(model), tester.outcomes(model))
        return found

    def _looked(self, members: Sequence[Member], merges: Mapping[str, Both], side: str) -> Looked:
        """Return what merges do on one side, beside the members and their bases by themselves."""
        tasks = [task for _, task in members]
        whole = [*members, *((base, None) for base in dict.fromkeys(base for base, _ in members))]
        singles = {
            f"{base} {own}": {task: getattr(self.single(base, own), side)[task] for task in tasks}
            for base, own in whole
        }
        kept = {task: singles[f"{base} {task}"][task] for base, task in members}
        return Looked({m: getattr(both, side) for m, both in merges.items()}, singles, kept)

    def _single(self, base: str, own: str | None) -> Both:
        """Score an expert, or a base, with heads fitted again for all other tasks."""
        experts = open_origins(list(self._experts(base).values())).experts
        params = experts.base if own is None else experts.tuned[self._tasks.index(own)]
        bench, tester = self._scorers(self._tasks)
        model = bench.single(experts, params, own)
        return Both(bench.scores(model), tester.outcomes(model))

    def _ensemble(self, base: str, tasks: Sequence[str]) -> float | None:
        """Return what the mean answer of two experts a task, one of each base, reaches on test."""
        if base == HOME:
            return None
        return sum(self.together(base, task) for task in tasks) / len(tasks)

    def _together(self, base: str, task: str) -> float:
        images = next(data.test for data in self._data if data.name == task)
        answers = []
        for of in (HOME, base):
            backbone, _ = load_base(self._settings["backbone"])
            expert = load_expert(self._experts(of)[task])
            backbone.load_state_dict(dict(expert.backbone))
            features, labels = features_of(backbone.eval(), images)
            answers.append(apply_head(expert.head, features).softmax(dim=1))
        mean = torch.stack(answers).mean(dim=0)
        return float((mean.argmax(dim=1) == labels).double().mean())

    def _scorers(self, tasks: Sequence[str]) -> tuple[Bench, Scorer]:
        """Return what scores networks on validation images, and what does on test images."""
        backbone, _ = load_base(self._settings["backbone"])
        own = [data for task in tasks for data in self._data if data.name == task]
        bench = Bench(backbone, own, images=self._settings["images"])
        return bench, Scorer(backbone, [replace(data, val=data.test) for data in own])

    @cached_property
    def _data(self) -> list[TaskData]:
        suite = load_suite(self._settings["suite"])
        return [suite.task(task).load(SplitOptions(seed=self._seed)) for task in self._tasks]

    def _experts(self, base: str) -> dict[str, Path]:
        """Return the expert of each task; train what is missing."""
        spec, steps = self._specs[base](), self._settings["training"]["steps"]
        return {task: self._trained(spec, task, base, steps) for task in self._tasks}

    def _trained(self, spec: str, task: str, folder: str, steps: int) -> Path:
        suite, config = self._settings["suite"], self._settings["training"]
        data = TaskDataModule(suite, task, batch=config["batch"], split_seed=self._seed)
        out = self._out / folder
        if not (out / f"{task}.record.json").is_file():
            train_expert(
                data=data,
                model=ExpertModule(spec, lr=config["lr"], seed=self._seed),
                steps=[steps],
                out=out,
                trainer={"accelerator": "cpu", "devices": 1},
                checkpoint_every=0,
            )
        return out / f"{task}.safetensors"

    def _near(self, steps: int) -> str:
        """Return the spec of a base near the shipped one: an expert of another task."""
        home, folder = self._settings["backbone"], f"base-{steps}"
        path = self._out / folder / "base.safetensors"
        if not path.is_file():
            tuned = load_expert(self._trained(home, self._settings["near"]["task"], folder, steps))
            _, base = load_base(home)
            save_base(path, replace(base, params=dict(tuned.backbone)))
        return f"{home}@{path}"


if __name__ == "__main__":
    main()
