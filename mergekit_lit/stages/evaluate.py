"""This file is the evaluation stage: model files in, one record with every score out."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from mergekit_lit.core.experts import Base, Expert, Merged
from mergekit_lit.core.files import write_text
from mergekit_lit.core.params import Params
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.batches import EvalLoader
from mergekit_lit.data.splits import TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.evaluation import (
    Entry,
    EvaluationBatchNorm,
    Model,
    entries_for,
    experts_of,
    heads_of,
    observe,
)
from mergekit_lit.lit.launch import check_world_size, trainer_arguments
from mergekit_lit.lit.merge import MergeModule
from mergekit_lit.lit.passes import pixels
from mergekit_lit.lit.quiet import interruptible, quiet
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, base_model
from mergekit_lit.lit.scores import OutcomeLog, Outcomes, score_table
from mergekit_lit.lit.suite_data import MergeDataModule, split_images
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.reports.results import by_task, csv_text, result_rows, summary
from mergekit_lit.stages.cautions import cautions
from mergekit_lit.stages.folders import check_folder, check_record
from mergekit_lit.stages.model_files import load_models
from mergekit_lit.stages.run_groups import facts_of_run, used_files


# Each argument is one flag of the command line, hence so many.
def evaluate_files(  # noqa: PLR0913
    models: Sequence[str | Path],
    *,
    data: MergeDataModule,
    batch_norm: EvaluationBatchNorm = "recalibrate-per-task",
    out: Path | None = None,
    name: str = "evaluation",
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    logger: LoggerKind = "csv",
    seed: int = 0,
) -> Record:
    """Evaluate bases, experts and merged models on the tasks of a suite.

    Experts of different tasks are told as one model, `experts`, each on its own task; the base is
    evaluated with their heads. Without `data.tasks` the tasks are those that the models know; with
    it, an expert of another task is refused rather than passed over.

    Args:
        models: files of ours, or specs of bases such as `resnet`.
        data: suite, tasks, split and batch.
        batch_norm: BatchNorm statistics of bases and experts: `stored`, or estimated alike for all
            on training images of the task, as the head was fitted. Merged files carry theirs.
        out: folder of the results; nothing is written without one.
        name: name of the results: `<out>/<name>.record.json`, and `<name>.csv` with one row a model
            and task.
        trainer: arguments of Lightning's Trainer, such as `devices`.
        callbacks: callbacks for the Trainer.
        logger: `csv` (with JSON, always written), `tensorboard`, `wandb` (offline) or
            `wandb-online`: one run with tables of the results, which used the models.
        seed: seed of the bootstrap intervals.

    Returns:
        The record. Its metrics hold `models` (`lit.scores.score_table`, with kind and method of
        each), `splits` (hash and size by task) and `warnings`.

    Raises:
        FileNotFoundError: no such file.
        KeyError: unknown task, suite, split, base or policy, or a task without a head.
        ValueError: models that do not fit one another, the suite, or the launcher.
    """
    watch = Stopwatch()
    check_logger(logger, out)
    if not name or Path(name).name != name:
        raise ValueError(f"`name` must be the stem of a file, but is {name!r}.")
    if out is not None:
        check_folder(Path(out))
        check_record(Path(out) / f"{name}.record.json", "evaluate")
    loaded = load_models(models)
    _choose_tasks(data, loaded.by_name)
    data.setup()
    module = MergeModule(loaded.backbone, loaded.by_name, batch_norm=batch_norm, seed=seed)
    with quiet(), interruptible():
        runner = _trainer(trainer or {}, callbacks)
        runner.test(module, datamodule=data, verbose=False)
    table = _told(module.results(), loaded.by_name)
    files = [] if out is None else [f"{name}.record.json", f"{name}.csv"]
    record = Record(
        stage="evaluate",
        name=name,
        config=_config(models, data, batch_norm, trainer or {}),
        inputs=loaded.inputs,
        seeds={"intervals": seed, "split": data.options.seed},
        metrics={
            "models": table,
            "splits": _splits(data),
            "warnings": cautions(table, loaded.by_name, data.task_data, split=data.split),
        },
        outputs=files,
    )
    watch.finish(record)
    if out is not None and runner.is_global_zero:
        _write(record, Path(out))
        if logger != "csv":
            _track(record, Path(out), loaded.by_name, logger)
    return record


def evaluate_models(
    backbone: Backbone,
    models: Mapping[str, Model],
    data: Sequence[TaskData],
    *,
    split: str = "val",
    batch_norm: EvaluationBatchNorm = "recalibrate-per-task",
    heads: Mapping[str, Params] | None = None,
    batch: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate models in memory, in a plain loop: for grids of coefficients.

    The same numbers as `evaluate_files`. Each batch is prepared once for all models.

    Args:
        backbone: the architecture; its own values are not used.
        models: models by name; a sequence of experts is one model, each on its own task.
        data: the tasks.
        split: `train`, `val` or `test`.
        batch_norm: BatchNorm statistics of bases and experts; merged models carry theirs.
        heads: heads of the bases by task; the experts' by default.
        batch: images in one batch.
        seed: seed of the intervals.

    Returns:
        The table of `lit.scores.score_table`; normalised by the experts among the models.
    """
    module = copy.deepcopy(backbone).eval()
    chosen = heads if heads is not None else heads_of(models)
    outcomes: dict[str, dict[str, Outcomes]] = {}
    for task in data:
        entries = entries_for(models, task, module, heads=chosen, batch_norm=batch_norm)
        if not entries:
            continue
        for name, found in _task_outcomes(module, entries, task, split, batch).items():
            outcomes.setdefault(name, {})[task.name] = found
    experts = {
        task: found
        for name, by_task in outcomes.items()
        if experts_of({name: models[name]})
        for task, found in by_task.items()
    }
    return score_table(outcomes, experts=experts, seed=seed)


def _write(record: Record, out: Path) -> None:
    """Write the record and its table."""
    write_text(out / f"{record.name}.csv", csv_text(result_rows(record)))
    record.write(out / f"{record.name}.record.json")


def _track(record: Record, out: Path, models: Mapping[str, Model], logger: LoggerKind) -> None:
    """Tell of the evaluation: means, every score, models by tasks, and which files were used."""
    rows = result_rows(record)
    bases = [model for model in models.values() if isinstance(model, Base)]
    methods = {str(row["method"]) for row in rows if row["method"]}
    tags = [Path(record.config["suite"]).name, record.config["split"], *sorted(methods)]
    outcome = Outcome(
        summary=summary(rows),
        tables={"results": rows, "accuracy": by_task(rows, ["model"])},
        used=[*map(base_model, bases), *used_files(record.inputs)],
    )
    told = facts_of_run(record.stage, record.name, out, tags=tags, config=record.config)
    log_run(logger, out / "logs" / record.name, told, outcome)


def _choose_tasks(data: MergeDataModule, models: Mapping[str, Model]) -> None:
    """Set the tasks to those that the models know, in the suite's order, unless they are given."""
    suite = load_suite(data.suite, root=data.root)
    known = {expert.name for expert in experts_of(models)}
    if data.tasks is not None:
        left = sorted(known - set(suite.chosen(data.tasks)))
        if left:
            raise ValueError(
                f"Every expert must be of one of `data.tasks` ({', '.join(data.tasks)}), but one "
                f"is of {left[0]!r}. Add that task, or leave that expert out."
            )
        return
    known |= {
        task for model in models.values() if isinstance(model, Merged) for task in model.tasks
    }
    for task in sorted(known):
        suite.task(task)
    data.tasks = tuple(name for name in suite.names if name in known) or None


def _trainer(explicit: Mapping[str, Any], callbacks: Sequence[Callback]) -> Trainer:
    """Return a quiet Trainer: one device unless the user or the launcher says otherwise."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    arguments = {"devices": 1, **quiet, **trainer_arguments(explicit)}
    trainer = Trainer(**arguments, callbacks=list(callbacks))
    check_world_size(trainer)
    return trainer


def _task_outcomes(
    backbone: Backbone, entries: Sequence[Entry], task: TaskData, split: str, batch: int
) -> dict[str, Outcomes]:
    """Return what each model does on each image of one task."""
    log = OutcomeLog()
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        for x, labels, position in EvalLoader(split_images(task, split), batch=batch):
            images, y = pixels(backbone, x.to(device)), labels.to(device)
            for cell, entry in enumerate(entries):
                log.update(cell, position, observe(backbone, entry, images, y))
    return {entries[cell].model: found for cell, found in log.outcomes().items()}


def _told(table: dict[str, Any], models: Mapping[str, Model]) -> dict[str, Any]:
    """Return the table with what each model is, and how it was merged."""
    return {name: _facts(models[name]) | scores for name, scores in table.items()}


def _facts(model: Model) -> dict[str, Any]:
    if isinstance(model, Base):
        return {"kind": "base"}
    if not isinstance(model, Merged):
        return {"kind": "expert" if isinstance(model, Expert) else "experts"}
    kept = {key: model.facts.get(key) for key in ("method", "config", "data", "batch_norm")}
    return {"kind": "merged", **kept, "scale": (kept["config"] or {}).get("scale")}


def _splits(data: MergeDataModule) -> dict[str, Any]:
    return {
        task.name: {"split_hash": task.split_hash, "n": len(split_images(task, data.split))}
        for task in data.task_data
    }


def _config(
    models: Sequence[str | Path],
    data: MergeDataModule,
    batch_norm: str,
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    settings = {name: value for name, value in data.hparams.items() if name != "tasks"}
    return {
        "models": [str(given) for given in models],
        **settings,
        "tasks": list(data.tasks or ()),
        "batch_norm": batch_norm,
        "trainer": dict(trainer),
    }
