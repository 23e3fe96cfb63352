"""This file is a sweep from its plan to its table: launched, watched, and told at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from rich.console import Console

from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record, Stopwatch, plain
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit.preemption import preemptible
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.lit.tracking import check_logger
from mergekit_lit.search.display import Display
from mergekit_lit.search.sweeping.axes import Axes
from mergekit_lit.search.sweeping.claims import server_time
from mergekit_lit.search.sweeping.jobs import Job
from mergekit_lit.search.sweeping.launchers.local import run_local
from mergekit_lit.search.sweeping.launchers.ray import ray_cluster, run_ray
from mergekit_lit.search.sweeping.launchers.slurm import run_slurm, slurm_executor
from mergekit_lit.search.sweeping.launchers.wandb import check_options, run_wandb, write_definition
from mergekit_lit.search.sweeping.lockstep import LockstepMode, findings, obstacles
from mergekit_lit.search.sweeping.plan import Plan, plan_runs
from mergekit_lit.search.sweeping.results import Outcome, outcome_of, write_table
from mergekit_lit.search.sweeping.studies import Study, Trials, check_study
from mergekit_lit.search.sweeping.tracking import log_sweep
from mergekit_lit.search.sweeping.worker import Listen, Sweep
from mergekit_lit.stages.folders import SWEEP_FILE, SWEEP_RECORD, check_folder, check_record

LauncherName = Literal["local", "ray", "slurm", "wandb"]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep made.

    Attributes:
        record: settings, numbers of runs and experts, errors, seconds.
        table: `results.csv`, a row for each expert or model.
        outcome: the runs that are done, and the errors of the others.
    """

    record: Record
    table: Path
    outcome: Outcome


# What is swept, and each choice of how, hence so many.
@preemptible("The same sweep goes on.")
def run_sweep(  # noqa: PLR0913
    axes: Sequence[Axes],
    job: Job,
    *,
    out: Path,
    study: Study | None = None,
    launcher: LauncherName = "local",
    options: Mapping[str, Any] | None = None,
    jobs: int = 1,
    retries: int = 2,
    lockstep: LockstepMode = "never",
    logger: LoggerKind = "csv",
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Do every run of the axes that is not done yet.

    Writes `sweep.yaml`, `runs/<name>/` for each run, and at the end `results.csv` and
    `sweep.record.json`. It can be killed at any time, and started again, also while another launch
    of it runs. Where this process is told to end (`lit.preemption`), trainings keep what they have.

    Args:
        axes: mappings of axes.
        job: what is done at each point.
        out: the sweep's folder.
        study: how Optuna is asked, if it is.
        launcher: where workers run.
        options: of the launcher, as it takes them.
        jobs: number of workers, at least 1.
        retries: how often a run that failed is tried again, at least 0.
        lockstep: which runs are done at once, with one pass for all.
        logger: where the sweep is told as a whole, beside its files; its runs are told as their
            configuration says.
        config: the sweep's file, to be kept.
        quiet: whether to draw no progress.

    Raises:
        KeyError: an unknown launcher.
        ValueError: an argument out of range, or a folder that cannot be written.
        SystemExit: the process was told to end by a signal.
    """
    watch = Stopwatch()
    if launcher == "wandb":
        logger = "wandb-online"
        check_known(study)
    else:
        check_logger(logger)
    plan, trials = first_plan(axes, job, study)
    check_folder(out)
    check_record(out / SWEEP_RECORD, "sweep")
    start = _starter(launcher, options or {}, out / "slurm", jobs=jobs, retries=retries)
    write_text(out / SWEEP_FILE, yaml.safe_dump(plain(config or {}), sort_keys=False))
    # Workers elsewhere may stand in another folder.
    out = out.absolute()
    begun = server_time(out)
    sweep = Sweep(plan=plan, job=job, out=out, begun=begun, retries=retries, lockstep=lockstep)
    if launcher == "wandb":
        write_definition(sweep, options or {})
    with Display(Console(quiet=quiet, stderr=True)) as display:
        for line in obstacles(sweep):
            display.say(line)
        _run(start, sweep, display, jobs)
        while trials and trials.ask(sweep):
            sweep = replace(sweep, plan=trials.plan())
            _run(start, sweep, display, jobs)
    outcome = outcome_of(sweep)
    table = write_table(sweep, outcome)
    record = watch.finish(
        Record(
            stage="sweep",
            name=out.resolve().name,
            config=plain(config or {}),
            metrics=_metrics(sweep, outcome) | (trials.told(sweep) if trials else {}),
            outputs=[SWEEP_FILE, table.name],
        )
    )
    record.write(out / SWEEP_RECORD)
    if logger != "csv":
        log_sweep(sweep, outcome, record, logger)
    return SweepResult(record, table, outcome)


@preemptible("The same sweep goes on.")
def run_one(
    axes: Sequence[Axes],
    job: Job,
    name: str,
    *,
    out: Path,
    study: Study | None = None,
    retries: int = 2,
) -> Outcome:
    """Do one run of a sweep in this process, unless it is done; wait where another is at it.

    Args:
        axes: of the sweep, as `run_sweep` takes them, like the arguments that follow.
        job: what is done at each point.
        name: of the run.
        out: the sweep's folder.
        study: must be None: which runs Optuna asks for is not known before.
        retries: how often the run is tried again.

    Raises:
        ValueError: there is no such run.
    """
    check_known(study)
    plan = plan_runs(axes, job)
    runs = tuple(run for run in plan.runs if run.name == name)
    if not runs:
        raise ValueError(
            f"`run` must name one of the sweep's {len(plan.runs)} runs, but is {name!r}. Their "
            "names change with the sweep's file: launch the sweep again."
        )
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    plan = replace(plan, runs=runs)
    sweep = Sweep(plan=plan, job=job, out=out, begun=server_time(out), retries=retries)
    run_local(sweep, lambda *_: None, jobs=1)
    return outcome_of(sweep)


def check_known(study: Study | None) -> None:
    """Refuse Optuna where every run must be known before the first is done.

    Raises:
        ValueError: there is a study.
    """
    if study is not None:
        raise ValueError(
            "`optuna` must be left out where each run is started by its name, as by the launcher "
            "'wandb': which runs follow is known only later. Use another launcher."
        )


def first_plan(axes: Sequence[Axes], job: Job, study: Study | None) -> tuple[Plan, Trials | None]:
    """Return the runs that are known before any is done, and the trials that more will follow.

    Raises:
        ValueError: an unknown key, a wrong value, or a study that does not fit the axes.
        ModuleNotFoundError: Optuna is asked for and not installed.
    """
    check_study(study, axes, job)
    if study is None:
        return plan_runs(axes, job), None
    trials = Trials(study, axes[0], job)
    trials.ask(None)
    return trials.plan(), trials


def _starter(
    launcher: str, options: Mapping[str, Any], folder: Path, *, jobs: int, retries: int
) -> Callable[[Sweep, Listen, int], None]:
    """Return what starts workers, once its settings have been looked at."""
    if launcher not in get_args(LauncherName):
        raise KeyError(unknown_name("launcher", launcher, get_args(LauncherName)))
    for name, value, least in (("jobs", jobs, 1), ("retries", retries, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    if launcher == "slurm":
        executor = slurm_executor(folder, options)
        return lambda sweep, listen, workers: run_slurm(
            sweep, listen, jobs=workers, executor=executor
        )
    if launcher == "ray":
        worker = ray_cluster(options)
        return lambda sweep, listen, workers: run_ray(sweep, listen, jobs=workers, worker=worker)
    if launcher == "wandb":
        check_options(options)
        return lambda sweep, listen, workers: run_wandb(
            sweep, listen, jobs=workers, options=options
        )
    if options:
        raise ValueError(
            f"`launcher_options` must be left out with the launcher 'local', but are {options!r}."
        )
    return lambda sweep, listen, workers: run_local(sweep, listen, jobs=workers)


def _run(
    start: Callable[[Sweep, Listen, int], None], sweep: Sweep, display: Display, jobs: int
) -> None:
    """Run a sweep with a bar, and with no more workers than runs."""
    runs = len(sweep.plan.runs)
    start(sweep, _drawer(display, runs), min(jobs, max(1, runs)))


def _metrics(sweep: Sweep, outcome: Outcome) -> dict[str, Any]:
    found = findings(sweep.out)
    return {
        "runs": len(sweep.plan.runs),
        "results": sweep.plan.results,
        "done": len(outcome.done),
        "failed": dict(outcome.failed),
        **({"lockstep": [asdict(each) for each in found]} if found else {}),
    }


def _drawer(display: Display, total: int) -> Listen:
    """Return what draws a bar of the runs, and tells of each that fails."""
    ended: set[str] = set()
    failed: set[str] = set()

    def listen(state: str, name: str, error: str) -> None:
        if state != "begun":
            ended.add(name)
        if state == "failed":
            failed.add(name)
            display.say(f"Run {name} failed: {error}")
        note = f"{len(failed)} failed, now {name}" if failed else name
        display.show("runs", len(ended), total, note)

    display.show("runs", 0, total)
    return listen
