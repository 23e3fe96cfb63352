"""This file compares merge methods on one suite over seeds, and prints the tables of the README.

    python experiments/methods.py experiments/methods_embedded8.yaml --out runs/methods

Trains the experts that are missing, then scores each row of the YAML: its scale is chosen on
validation images, and the merge is scored once on test images. What is there is not made again.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from finished import stem_of
from inputs import MAPPING, SEEDS, WORD, check_keys, named
from omegaconf import OmegaConf

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Merged
from mergekit_lit.core.files import read_json, write_json
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import (
    CALIBRATION_IMAGES,
    images_by_split,
    splits_needed,
)
from mergekit_lit.merging.configuration import SCALE, resolve
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.reports.intervals import mean_told
from mergekit_lit.reports.tables import DATA_WORDS
from mergekit_lit.search.coefficients import Choice, choose, scale_grid
from mergekit_lit.search.crew import Crew
from mergekit_lit.search.stations import Plan, judge_of, train_one
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe, merge_recipe

if TYPE_CHECKING:
    from mergekit_lit.lit.evaluation import Model

POLICY: BatchNormPolicy = "recalibrate-per-task"


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with a configuration, on all seeds or on some."""

    name: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    batch_norm: BatchNormPolicy = POLICY


REFERENCE_ROW = Row("reference", "")
"""Base and experts, which the others are compared with."""


def main() -> None:
    """Make what is missing, and print one table a backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, backbones, seeds, rows ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="in place of the file's")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the file's")
    parser.add_argument("--rows", nargs="+", help="some of the file's rows")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {k: v for k in ("suite", "backbones", "seeds") if (v := getattr(given, k))}
    rows = [row_of(entry) for entry in settings["rows"]]
    rows = [row for row in rows if given.rows is None or row.name in given.rows]
    for backbone in settings["backbones"]:
        plans = [plan_of(settings, backbone, seed, given.out) for seed in settings["seeds"]]
        make(plans, rows, given.jobs)
        print(f"\n### {backbone}\n\n{markdown(plans, rows)}", flush=True)


def make(plans: Sequence[Plan], rows: Sequence[Row], jobs: int) -> None:
    """Train the experts and score the rows that are not there yet."""
    with Crew(jobs) as crew:
        tasks = [(plan, task) for plan in plans for task in plan.tasks]
        missing = [(p, t) for p, t in tasks if not (p.out / f"{t}.safetensors").is_file()]
        crew.run(train_one, missing)
        for wanted in ([REFERENCE_ROW], rows):
            todo = [(p, r) for p in plans for r in wanted if r.seeds is None or p.seed in r.seeds]
            crew.run(score_row, [(p, r) for p, r in todo if not path_of(p, r).is_file()])


def score_row(job: tuple[Plan, Row]) -> Path:
    """Score one row and write what came out; `reference` is base and experts."""
    plan, row = job
    cell = _cell(plan)
    path = path_of(plan, row)
    write_json(path, cell.reference() if row == REFERENCE_ROW else cell.scored(row))
    print(path, flush=True)
    return path


class _Cell:
    """Everything that the rows of one backbone, suite and seed share."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        paths = plan.expert_paths()
        self._backbone, self._base = load_base_of(paths, plan.backbone)
        self._experts = in_memory(load_experts(paths, base=self._base))
        self._files = [load_expert(path) for path in paths]
        suite = load_suite(plan.suite)
        self._data = [suite.task(task).load(plan.split) for task in plan.tasks]

    def reference(self) -> dict[str, Any]:
        """Return the accuracies of base and experts by split and task."""
        models: dict[str, Model] = {"base": self._base, "experts": self._files}
        return {
            split: _accuracies(
                evaluate_models(self._backbone, models, self._data, split=split, batch_norm=POLICY)
            )
            for split in ("val", "test")
        }

    def scored(self, row: Row) -> dict[str, Any]:
        """Return what one row reaches on test images, and what it took."""
        started = time.process_time()
        choice = self._chosen(row)
        searched = time.process_time()
        config = {**row.config, **({SCALE: choice.chosen} if choice else {})}
        merged = self._merged(row.method, config, row.batch_norm)
        made = time.process_time()
        heads = dict(zip(self._experts.names, self._experts.heads, strict=True))
        table = evaluate_models(
            self._backbone, {row.name: merged}, self._data, split="test", heads=heads
        )
        return {
            "method": row.method,
            "config": config,
            "data": merged.facts["data"],
            "choice": choice and dict(zip(map(str, choice.scales), choice.values, strict=True)),
            "accuracy": _accuracies(table)[row.name],
            "search_cpu_seconds": round(searched - started, 2),
            "merge_cpu_seconds": round(made - searched, 2),
        }

    def _chosen(self, row: Row) -> Choice | None:
        grid = () if SCALE in row.config else scale_grid(MERGE_METHODS.get(row.method))
        if not grid:
            return None
        judge = judge_of(self._plan)
        return choose(
            grid,
            lambda scales: list(
                judge.scores(row.method, [{**row.config, SCALE: scale} for scale in scales])
            ),
        )

    def _merged(
        self, method: str, config: Mapping[str, Any], batch_norm: BatchNormPolicy
    ) -> Merged:
        needed = splits_needed(method, batch_norm, self._experts.structure)
        images = images_by_split(self._data, needed, count=CALIBRATION_IMAGES)
        recipe = Recipe(method=method, config=config, batch_norm=batch_norm)
        return merge_recipe(self._experts, recipe, self._backbone, images)


@lru_cache(maxsize=1)
def _cell(plan: Plan) -> _Cell:
    return _Cell(plan)


def markdown(plans: Sequence[Plan], rows: Sequence[Row]) -> str:
    """Return a table of means over seeds with Student's 95 % intervals over the seeds."""
    references = {plan: read_json(path_of(plan, REFERENCE_ROW))["test"] for plan in plans}
    lines = [
        "| method | data | scale by seed | accuracy | normalised accuracy | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    told = [_told_model(name, references) for name in ("base", "experts")]
    for row in rows:
        found = {p: read_json(path_of(p, row)) for p in plans if path_of(p, row).is_file()}
        if found:
            told.append(_told_row(row, found, references))
    return "\n".join(lines + [line for _, line in sorted(told)])


def _told_model(name: str, references: Mapping[Plan, Any]) -> tuple[float, str]:
    plain = [statistics.fmean(found[name].values()) for found in references.values()]
    ratios = [statistics.fmean(_ratios(f[name], f["experts"])) for f in references.values()]
    line = f"| {name} | | | {mean_told(plain)} | {mean_told(ratios)} | |"
    return statistics.fmean(plain), line


def _told_row(
    row: Row, found: Mapping[Plan, Any], references: Mapping[Plan, Any]
) -> tuple[float, str]:
    plain = [statistics.fmean(entry["accuracy"].values()) for entry in found.values()]
    ratios = [
        statistics.fmean(_ratios(entry["accuracy"], references[plan]["experts"]))
        for plan, entry in found.items()
    ]
    entries = list(found.values())
    scales = ", ".join(f"{e['config'][SCALE]:g}" for e in entries if e["choice"])
    seconds = statistics.median(e["merge_cpu_seconds"] for e in entries)
    few = f" (seed {', '.join(str(plan.seed) for plan in found)})" if row.seeds else ""
    cells = [row.name + few, DATA_WORDS[entries[0]["data"]], scales, mean_told(plain)]
    line = f"| {' | '.join([*cells, mean_told(ratios), f'{seconds:.1f}'])} |"
    return statistics.fmean(plain), line


def _accuracies(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {task: row["accuracy"] for task, row in entry["tasks"].items()}
        for name, entry in table.items()
    }


def _ratios(model: Mapping[str, float], experts: Mapping[str, float]) -> list[float]:
    """Return accuracy over the expert's, by task; an expert without a right image counts as 1."""
    return [value / (experts[task] or 1.0) for task, value in model.items()]


def row_of(entry: str | Mapping[str, Any]) -> Row:
    """Return a row of the YAML: a method's name, or row, method, config, seeds and batch_norm.

    Raises:
        KeyError: an unknown key, method or parameter.
        ValueError: a key is missing, or a value is not what it must be.
    """
    if isinstance(entry, str):
        entry = {"row": entry, "method": entry}
    optional = ("config", "seeds", "batch_norm")
    entry = check_keys(f"the row {entry!r}", entry, _ROW_KEYS, optional=optional)
    resolve(MERGE_METHODS.get(entry["method"]), entry.get("config", {}))
    policy = entry.get("batch_norm", POLICY)
    named("policy of BatchNorm statistics", [policy], get_args(BatchNormPolicy))
    seeds = tuple(entry["seeds"]) if "seeds" in entry else None
    return Row(entry["row"], entry["method"], entry.get("config", {}), seeds, policy)


_ROW_KEYS = {"row": WORD, "method": WORD, "config": MAPPING, "seeds": SEEDS, "batch_norm": WORD}


def plan_of(settings: Mapping[str, Any], backbone: str, seed: int, out: Path) -> Plan:
    """Return where the experts of a backbone and a seed lie, and how they were made."""
    suite = settings["suite"]
    tasks = settings.get("tasks") or load_suite(suite).names
    folder = out / Path(suite).name / f"{backbone}-{seed}"
    recipe = settings["experts"]
    return Plan(backbone=backbone, suite=suite, tasks=tuple(tasks), out=folder, seed=seed, **recipe)


def path_of(plan: Plan, row: Row) -> Path:
    """Return where a row's scores lie."""
    return plan.out / f"rows{len(plan.tasks)}" / f"{stem_of(row.name)}.json"


if __name__ == "__main__":
    main()
