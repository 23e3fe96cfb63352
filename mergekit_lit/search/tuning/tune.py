"""This file is the search for a merge: methods and their parameters, by validation images alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lit.core.expert_files import load_merged
from mergekit_lit.core.experts import Base
from mergekit_lit.core.files import file_hash, write_text
from mergekit_lit.core.locks import sole_writer
from mergekit_lit.core.records import Record, Stopwatch, plain
from mergekit_lit.data.splits import TaskData, split_hash
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, file_model
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.merging.gather import load_experts
from mergekit_lit.reports.results import csv_text
from mergekit_lit.search.predicting.table import read_table
from mergekit_lit.search.tuning.loading import make_bench
from mergekit_lit.search.tuning.loop import candidate_of
from mergekit_lit.search.tuning.objective import check_goal
from mergekit_lit.search.tuning.plan import TuningPlan, check_plan
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.prior import measured_of
from mergekit_lit.search.tuning.race import Run
from mergekit_lit.search.tuning.results import chosen_of, results_of, trial_rows
from mergekit_lit.search.tuning.running import run_search
from mergekit_lit.search.tuning.space import start_of
from mergekit_lit.search.tuning.trials import TrialLog
from mergekit_lit.stages.folders import check_folder
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import MergeResult, merge_files
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe, check_recipe
from mergekit_lit.stages.run_groups import facts_of_run, used_files


@dataclass(frozen=True)
class TuningResult:
    """What a search found.

    Attributes:
        record: every number, with its configuration.
        record_path: the same as a file.
        table_path: one row a trial, as CSV.
        best: the best merged model.
    """

    record: Record
    record_path: Path
    table_path: Path
    best: Path


def tune_files(
    experts: Sequence[Path],
    *,
    out: Path,
    plan: TuningPlan,
    calibration: Calibration,
    base: str | None = None,
    allow_different_base: bool = False,
    logger: LoggerKind = "csv",
    quiet: bool = False,
) -> TuningResult:
    """Search the parameters of merge methods on validation images, and merge with the best.

    Method by method; or to a budget, over methods, parameters and BatchNorm policies at once.

    Candidates are merged in memory, many in one pass over the files, and their weights copied into
    one module. `out` holds `trials.jsonl`, a line for each trial as soon as it is done, so that the
    same command goes on where a killed one stopped; then `best.safetensors` with its record,
    `trials.csv`, and `tune.record.json`.

    Args:
        experts: one file per expert, each of another task, all of one base.
        out: the folder; a new one, or that of the same search.
        plan: what is searched, and how.
        calibration: suite and split of the tasks; its `images` are for the merge that is written,
            and for methods that look at some.
        base: spec of the base; the one that the first card names by default.
        allow_different_base: take experts whose card names another base, or none.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with the table of trials, and the best model as its artifact.
        quiet: whether to draw no progress.

    Raises:
        FileNotFoundError: an expert or the table is missing.
        KeyError: an unknown name.
        ModuleNotFoundError: Optuna, pyarrow or W&B is wanted and not installed.
        TypeError: a value of the wrong type.
        ValueError: a value out of range, experts that cannot be merged, tasks without validation
            images, or a folder that holds another search, or is written by another process.
    """
    watch = Stopwatch()
    out, paths = Path(out), [Path(path) for path in experts]
    check_plan(plan)
    for method in plan.methods:
        start = start_of(plan.space_of(method))
        for policy in plan.policies:
            check_recipe(_recipe(plan, Candidate(method, start, policy)), calibration)
    measured = measured_of(read_table(plan.table)) if plan.table else None
    check_folder(out)
    check_logger(logger)
    with sole_writer(out / "tune.lock"):
        backbone, loaded = load_base_of(paths, base)
        gathered = load_experts(paths, base=loaded, allow_different_base=allow_different_base)
        check_goal(plan.objective, plan.metric, plan.weights, list(gathered.names))
        tasks = list(calibration.tasks(gathered.names))
        log = TrialLog(out / "trials.jsonl", _facts(plan, calibration, paths, loaded, tasks))
        bench = make_bench(gathered, backbone.to(plan.torch_device()), tasks, plan, calibration)
        run_search(bench, log, plan, measured, quiet=quiet)
        results, best = results_of(log, plan, bench.count), chosen_of(log, plan)
        made = merge_files(
            paths,
            out=out / "best.safetensors",
            recipe=_recipe(plan, candidate_of(best)),
            base=base,
            allow_different_base=allow_different_base,
            calibration=calibration,
        )
        record = _record(plan, calibration, made, loaded)
        written = bench.under(best.batch_norm).run(load_merged(made.path))
        record.metrics = {
            "best": {"method": best.method, "batch_norm": best.batch_norm, **_scores(written)},
            "base": _scores(bench.run(bench.at_base())),
            **results,
            "validation_images": bench.count,
        }
        watch.finish(record)
        rows = trial_rows(log)
        write_text(out / "trials.csv", csv_text(rows))
        record.write(out / "tune.record.json")
        if logger != "csv":
            _track(record, made, rows, logger)
    return TuningResult(record, out / "tune.record.json", out / "trials.csv", made.path)


def _recipe(plan: TuningPlan, candidate: Candidate) -> Recipe:
    return Recipe(
        method=candidate.method,
        config=candidate.config,
        veneers=plan.then,
        batch_norm=candidate.batch_norm,
        seed=plan.seed,
    )


def _facts(
    plan: TuningPlan,
    calibration: Calibration,
    paths: Sequence[Path],
    base: Base,
    tasks: Sequence[TaskData],
) -> dict[str, Any]:
    """Return all that the values of trials depend on."""
    return {
        **plan.facts(),
        "images": calibration.images,
        "base": base.content,
        # Their order counts: some methods draw by it, or go from the first to the second.
        "experts": [[task.name, file_hash(path)] for task, path in zip(tasks, paths, strict=True)],
        "tasks": {
            task.name: [task.split_hash, split_hash(task.name, task.classes, task.val)]
            for task in tasks
        },
    }


def _record(plan: TuningPlan, calibration: Calibration, made: MergeResult, base: Base) -> Record:
    """Return the record without its metrics; its config has the names of the command's flags."""
    data = asdict(calibration)
    options = data.pop("options")
    split_seed = options.pop("seed")
    return Record(
        stage="tune",
        name=" or ".join(plan.methods),
        config={
            **plain(asdict(plan)),
            "then": [{"name": name, "config": dict(config)} for name, config in plan.then],
            "experts": list(made.record.inputs),
            "base": base.name,
            "allow_different_base": made.record.config["allow_different_base"],
            "out": str(made.path.parent),
            "data": {**data, **options, "split_seed": split_seed},
        },
        inputs=made.record.inputs,
        seeds={"search": plan.seed, "split": split_seed},
        outputs=["best.safetensors", "trials.jsonl", "trials.csv"],
    )


def _track(
    record: Record, made: MergeResult, rows: Sequence[Mapping[str, Any]], logger: LoggerKind
) -> None:
    """Tell of the search: what was found, every trial, and the model that came of it."""
    out = made.path.parent
    outcome = Outcome(
        summary=record.metrics,
        tables={"trials": rows},
        used=used_files(made.record.inputs),
        made=[file_model(made.path, "merged", made.record.metrics["merged"])],
    )
    tags = [*record.metrics["methods"], str(record.config["base"])]
    told = facts_of_run(record.stage, record.name, out, tags=tags, config=record.config)
    log_run(logger, out / "logs" / "tune", told, outcome)


def _scores(run: Run) -> dict[str, Any]:
    return {"value": run.total, "by_task": dict(run.values)}
