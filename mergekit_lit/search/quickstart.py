"""This file is the whole path in one call: experts trained, merged, scored and reported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, file_model
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.reports.results import by_task, csv_text, result_rows, summary
from mergekit_lit.search.candidates import WELL_KNOWN, chosen_methods
from mergekit_lit.search.coefficients import Choice
from mergekit_lit.search.crew import Crew, Message
from mergekit_lit.search.display import Display, results
from mergekit_lit.search.stations import Made, Plan, merge_one, train_one
from mergekit_lit.stages.evaluate import evaluate_files
from mergekit_lit.stages.folders import check_folder
from mergekit_lit.stages.report import build_report
from mergekit_lit.stages.run_groups import facts_of_run

_BATCH = 32
_WARMUP_STEPS = 20


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart made.

    Attributes:
        record: every number, with its configuration.
        record_path: the same as a file.
        table_path: the scores as CSV, one row a model and task.
        report_path: the page, self-contained.
        experts: the expert files, in the order of the tasks.
        merged: the merged model of each method.
    """

    record: Record
    record_path: Path
    table_path: Path
    report_path: Path
    experts: tuple[Path, ...]
    merged: dict[str, Path]


# Each argument is one flag of the command line, hence so many.
def run_quickstart(  # noqa: PLR0913
    *,
    backbone: str = "resnet",
    out: Path = Path("runs/quickstart"),
    suite: str = "embedded8",
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] = WELL_KNOWN,
    steps: int = 200,
    lr: float = 0.03,
    seed: int = 0,
    jobs: int = 2,
    logger: LoggerKind = "csv",
    quiet: bool = False,
) -> QuickstartResult:
    """Fine-tune an expert for each task, merge them by several methods, score and report.

    Heads are frozen nearest class means; BatchNorm statistics are estimated per task on training
    images for base, experts and merges alike. Each method's scale is chosen on validation images;
    test images are used once, for the scores.

    With W&B each expert is a run of the process that trains it, and the results are one more: all
    of them in one group, named like the folder.

    Args:
        backbone: `resnet` or `vit` (shipped), or any other base.
        out: folder of the run: experts, `merged/`, `logs/`, `record.json`, `results.csv` and
            `report.html`.
        suite: name of a suite, or a folder with the user's own tasks.
        tasks: names of tasks of the suite, in the order to merge them; None for all.
        methods: names of merge methods that need no data, or `all` for every one at hand.
        steps: optimizer steps of each expert, at least 1.
        lr: peak learning rate of SGD with momentum, positive. The default was chosen on validation
            images for both shipped bases.
        seed: seed of the data split, the order of images and all else.
        jobs: worker processes of one thread each; 1 runs everything in this process.
        logger: `csv` (with JSON, always written), `tensorboard`, `wandb` (offline) or
            `wandb-online`.
        quiet: whether to draw no progress and print no table.

    Raises:
        KeyError: an unknown suite, task, method or backbone.
        ValueError: an argument out of range, or an expert that diverged.
    """
    watch = Stopwatch()
    plan = _plan(backbone, suite, tasks, Path(out), seed=seed, steps=steps, lr=lr, logger=logger)
    chosen = chosen_methods(methods, experts=len(plan.tasks))
    console = Console(quiet=quiet)
    with Display(console) as display, Crew(jobs, listen=_drawer(display)) as crew:
        for task in plan.tasks:
            display.show(task, 0, plan.steps, "waiting")
        experts = crew.run(train_one, [(plan, task) for task in plan.tasks])
        for method in chosen:
            display.show(method, 0, 1, "waiting")
        made = crew.run(merge_one, [(plan, method) for method in chosen])
        display.show("test images", 0, 1)
        scored = _score(plan, made)
        display.show("test images", 1, 1)
    record = watch.finish(_record(plan, scored, made, jobs))
    record_path, table_path = plan.out / "record.json", plan.out / "results.csv"
    rows = result_rows(record)
    write_text(table_path, csv_text(rows))
    record.write(record_path)
    report = build_report(plan.out, title=_title(plan))
    console.print(results(record))
    console.print(f"{record.seconds:.0f} s. Report: {report}", highlight=False)
    if plan.logger != "csv":
        _track(plan, record, rows, made)
    merged = {merge.method: merge.path for merge in made}
    return QuickstartResult(record, record_path, table_path, report, tuple(experts), merged)


def _plan(
    backbone: str, suite: str, tasks: Sequence[str] | None, out: Path, **settings: Any
) -> Plan:
    """Return the plan, with everything that can be refused refused before any work."""
    steps = settings["steps"]
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, but is {steps!r}.")
    check_logger(settings["logger"])
    check_folder(out)
    return Plan(
        backbone=backbone,
        suite=suite,
        tasks=load_suite(suite).chosen(tasks),
        out=out,
        batch=_BATCH,
        warmup_steps=min(_WARMUP_STEPS, steps // 2),
        **settings,
    )


def _drawer(display: Display) -> Any:
    """Return the function that draws what the crew tells."""

    def draw(message: Message) -> None:
        _, name, done, total, note = message
        display.show(name, done, total, note)

    return draw


def _score(plan: Plan, made: list[Made]) -> Record:
    """Evaluate base, experts and merges on the test images, all with statistics made alike."""
    models: list[str | Path] = [
        plan.backbone,
        *plan.expert_paths(),
        *(merge.path for merge in made),
    ]
    data = MergeDataModule(plan.suite, tasks=plan.tasks, split="test", split_seed=plan.seed)
    return evaluate_files(
        models,
        data=data,
        batch_norm="recalibrate-per-task",
        trainer={"accelerator": "cpu", "devices": 1},
        seed=plan.seed,
    )


def _record(plan: Plan, scored: Record, made: list[Made], jobs: int) -> Record:
    return Record(
        stage="quickstart",
        name=f"quickstart of {plan.backbone}",
        config={
            "backbone": plan.backbone,
            "out": str(plan.out),
            "suite": plan.suite,
            "tasks": list(plan.tasks),
            "methods": [merge.method for merge in made],
            "steps": plan.steps,
            "lr": plan.lr,
            "seed": plan.seed,
            "jobs": jobs,
        },
        inputs=scored.inputs,
        seeds={"seed": plan.seed},
        metrics={
            **scored.metrics,
            "models": _with_val(scored.metrics["models"], made),
            "coefficients": {m.method: _curve(m.choice) for m in made if m.choice},
            "observers": {"DeltaGeometry": made[0].geometry} if made else {},
        },
        outputs=[str(path) for path in (*plan.expert_paths(), *(merge.path for merge in made))],
    )


def _track(
    plan: Plan, record: Record, rows: Sequence[Mapping[str, Any]], made: Sequence[Made]
) -> None:
    """Tell of the results; the experts' runs, in the same group, have ended by now."""
    outcome = Outcome(
        summary=summary(rows),
        tables={"results": rows, "accuracy": by_task(rows, ["model"])},
        used=[file_model(path, "expert") for path in plan.expert_paths()],
        made=[file_model(merge.path, "merged", merge.facts) for merge in made],
    )
    tags = [Path(plan.suite).name, plan.backbone]
    told = facts_of_run(record.stage, "results", plan.out, tags=tags, config=record.config)
    log_run(plan.logger, plan.out / "logs" / "results", told, outcome)


def _with_val(models: Mapping[str, Any], made: Sequence[Made]) -> dict[str, Any]:
    """Return the scores with each merge's score on val beside them."""
    val = {merge.method: {"val": merge.val} for merge in made}
    return {name: {**entry, **val.get(name, {})} for name, entry in models.items()}


def _curve(choice: Choice) -> dict[str, Any]:
    return {
        "scale": list(choice.scales),
        "normalised_accuracy": list(choice.values),
        "chosen": choice.chosen,
    }


def _title(plan: Plan) -> str:
    return f"{len(plan.tasks)} {plan.backbone} experts of {plan.suite}, merged"
