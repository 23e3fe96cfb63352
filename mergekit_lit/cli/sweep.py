"""This file is `mergekit-lit sweep`: one YAML file of axes, any number of runs, none of them twice.

The file is that of another command, with `job`, `axes` and what else `options` names beside its
keys.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.cuda import device_count

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.dotted import nested
from mergekit_lit.cli.evaluate import evaluate_parser
from mergekit_lit.cli.merge import merge_parser
from mergekit_lit.cli.merge_jobs import EvaluateJob, MergeJob, ScoreSplit
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import (
    add_parameters,
    command_parser,
    parse_mapping,
    read,
    value_of,
    values_of,
)
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.cli.train import train_parser
from mergekit_lit.cli.train_job import TrainJob
from mergekit_lit.cli.yaml_files import load_yaml
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.estimates import Estimate, estimate
from mergekit_lit.search.sweeping.jobs import Job
from mergekit_lit.search.sweeping.lockstep import Finding, LockstepMode
from mergekit_lit.search.sweeping.studies import Study
from mergekit_lit.search.sweeping.sweep import (
    LauncherName,
    SweepResult,
    first_plan,
    run_one,
    run_sweep,
)
from mergekit_lit.search.sweeping.worker import Sweep
from mergekit_lit.search.tuning.plan import told

_USAGE = "FILE.yaml [--out FOLDER] [--jobs N] [--dry_run] [--key VALUE of the job ...]"
_JOBS = ("evaluate", "merge", "train")
_SOME_FAILED = 1


# Each argument is one flag of the command line, hence so many.
def options(  # noqa: PLR0913
    *,
    out: Path,
    axes: dict[str, Any] | list[dict[str, Any]],
    job: str = "train",
    score: ScoreSplit = "none",
    optuna: dict[str, Any] | None = None,
    launcher: LauncherName = "local",
    launcher_options: dict[str, Any] | None = None,
    jobs: int | None = None,
    retries: int = 2,
    lockstep: LockstepMode = "never",
    run: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Say what is swept, and where. All other keys are the job's: `mergekit-lit train --help`.

    Args:
        out: the sweep's folder: `runs/<name>/` for each run, `results.csv`, `sweep.record.json`.
            The same command goes on where a killed one stopped; several may run at once.
        axes: keys of the job and what to try for each: `model.lr: [0.01, 0.03]` (every value with
            every other), `{list: [...]}` (value by value with other lists), or
            `{random: {low: 1e-4, high: 1e-1, log: true, samples: 20, seed: 0}}`, or
            `{optuna: {low: 0.1, high: 0.9}}`; or several such mappings in a list.
        job: what is done at each point: `train`, `merge` or `evaluate`.
        score: images of `data.suite` on which each merged model of `merge` is scored: `val` or
            `test`; `none` merges alone.
        optuna: how Optuna chooses for axes of the form `optuna`: `metric` (a column of
            `results.csv`; its mean over all other axes counts), `trials`, `batch` (trials at once)
            and `seed`.
        launcher: where workers run: `local`, processes of this machine, each pinned to a core or
            GPU; `slurm`, jobs of an array; `ray`, tasks of a Ray cluster; `wandb`, agents of a W&B
            sweep. Where there are several machines, `out` must be on a disk that they share.
        launcher_options: of `slurm`: parameters of submitit's executor, such as `timeout_min`,
            `mem_gb`, `gpus_per_node` or `slurm_partition` (a job at its time limit is queued again
            without end, or `slurm_max_num_timeout` times); of `ray`: arguments of `ray.init`, such
            as `address`, and `worker`, what each worker needs: `{num_cpus: 1, num_gpus: 0.5}`; of
            `wandb`: `entity` and `project`.
        jobs: workers, each of one thread; null for one a GPU, or a core where there is none.
        retries: how often a run that failed, or whose process died, is tried again, by all launches
            that work at the sweep together; errors of input are not. A later launch tries anew.
        lockstep: whether a worker trains up to 8 experts that differ in learning rate, weight
            decay, seed or data share at once, with one pass for all: `never`, which gives the bytes
            of separate runs; `auto` where it may be faster (on a GPU, or up to 8 samples a batch)
            and was, in steps of both ways, so that how busy the machine is decides; or `always`
            where it can be. In lockstep weights differ by rounding from those of separate runs: by
            1e-5 of a tensor's largest entry at most after 4 steps of SGD, by more the longer and
            the less stable a training is (tiny batches, large steps).
        run: do this run alone, by the name of its folder, in this process, as agents of W&B do.
        dry_run: whether to tell what would be done, and do nothing.
        json: whether to print the record, or the plan, as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    own = _parser()
    if not argv or {"-h", "--help"} & set(argv):
        own.print_help()
        return 0
    settings, given = _given(own, argv)
    made = parse_mapping(own, settings)
    job = _job(made, given)
    axes, study = read_axes(settings["axes"]), _study(made.optuna)
    if made.dry_run:
        whole = study and replace(study, batch=study.trials)
        plan, _ = first_plan(axes, job, whole)
        sweep = Sweep(plan=plan, job=job, out=made.out, begun=0.0)
        _print_plan(estimate(sweep), as_json=made.json)
        return 0
    if made.run is not None:
        one = run_one(axes, job, made.run, out=made.out, study=study, retries=made.retries)
        _print_failed(one.failed)
        return _SOME_FAILED if one.failed else 0
    result = run_sweep(
        axes,
        job,
        out=made.out,
        study=study,
        launcher=made.launcher,
        options=settings.get("launcher_options"),
        jobs=_places() if made.jobs is None else made.jobs,
        retries=made.retries,
        lockstep=made.lockstep,
        logger=given.get("logger", "csv"),
        config={**settings, **given},
        quiet=made.json,
    )
    if made.json:
        print_json(vars(result.record))
    else:
        _print(result)
    return _SOME_FAILED if result.outcome.failed else 0


def _parser() -> ArgumentParser:
    parser = command_parser("sweep", COMMANDS["sweep"], usage=_USAGE)
    add_parameters(parser, options)
    return parser


def _job(made: Namespace, given: dict[str, Any]) -> Job:
    if made.job == "merge":
        return MergeJob(given, made.score)
    if made.score != "none":
        raise ValueError(f"`score` must be left out of a sweep of {made.job!r}: it is of merges.")
    return EvaluateJob(given) if made.job == "evaluate" else TrainJob(given)


def _study(given: dict[str, Any] | None) -> Study | None:
    """Return how Optuna is asked."""
    if given is None:
        return None
    names = [each.name for each in fields(Study)]
    for name in given:
        if name not in names:
            raise ValueError(unknown_name("setting of `optuna`", name, names))
    if "metric" not in given:
        raise ValueError("`optuna.metric` must be given, such as val_accuracy.")
    return Study(**given)


def _places() -> int:
    """Return how many workers have a GPU of their own here, or a core where there is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return device_count() or cores or 1


def _given(own: ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what file and flags say: the sweep's own values, and those of its job."""
    words = [word.removeprefix("--config=") for word in argv]
    files = [word for word in words if word.endswith((".yaml", ".yml")) and word[0] != "-"]
    values: dict[str, Any] = {}
    for path in files:
        values = merged_values(values, load_yaml(path))
    if not files:
        raise ValueError("A sweep must be given as a YAML file: mergekit-lit sweep FILE.yaml.")
    job = [str(values.get("job", "train")), *values_of(argv, "job")][-1]
    method = [str(values.get("method", "average")), *values_of(argv, "method")][-1]
    both = _of_both(own, job, method)
    given = read(both, argv)
    for word in given.positionals:
        if word not in files:
            raise ValueError(f"A sweep must be given as a YAML file, but {word!r} is none.")
    for flag, text in given.options:
        key = flag.removesuffix("+")
        values = merged_values(values, nested({key: value_of(both, key, text)}))
    ours = {action.dest for action in own._actions} - {"help", "config"}
    mine = {key: value for key, value in values.items() if key in ours}
    return mine, {key: value for key, value in values.items() if key not in ours}


def _of_both(own: ArgumentParser, job: str, method: str) -> ArgumentParser:
    """Return a parser that knows the flags of the job, and those of the sweep."""
    if job not in _JOBS:
        raise ValueError(unknown_name("job", job, _JOBS))
    if job == "merge":
        both, _ = merge_parser(method)
    else:
        both = evaluate_parser() if job == "evaluate" else train_parser()
    known = {action.dest for action in both._actions}
    for action in own._actions:
        if action.dest not in known:
            both._add_action(action)
    return both


def _print_plan(plan: Estimate, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
        return
    print(
        f"{plan.runs:,} runs make {plan.results:,} results; {plan.shared:,} of them are "
        f"trajectories that several step counts share. {plan.left:,} runs are left to do."
    )
    if plan.core_hours is None or plan.disk_mb is None:
        print("What they cost is told when the first of them is done.")
        return
    hours = f"{plan.core_hours:,.2f} core-hours"
    hours += f", {plan.gpu_hours:,.2f} GPU-hours" if plan.gpu_hours else ""
    print(f"About {hours} and {plan.disk_mb:,.0f} MB of disk, by {plan.source}.")


def _print_failed(failed: Mapping[str, str]) -> None:
    rows = [{"run": name, "error": error} for name, error in failed.items()]
    if rows:
        print_table(rows, {"run": "failed", "error": "error"})


def _print(result: SweepResult) -> None:
    metrics = result.record.metrics
    _print_failed(metrics["failed"])
    for finding in metrics.get("lockstep", ()):
        print(Finding(**finding))
    best = metrics.get("best")
    if best:
        print(f"Best {metrics['metric']}: {best['value']:.4f} at {told(best['point'])}.")
    print(f"{metrics['done']} of {metrics['runs']} runs are done. Results: {result.table}")
