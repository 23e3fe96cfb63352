"""This file is `mergekit-lit sweep`: one YAML file of axes, any number of runs, none of them twice.

The file is that of another command, with `job`, `axes` and what else `options` names beside its
keys.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.jobs import TrainJob, nested
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import (
    add_parameters,
    command_parser,
    load_yaml,
    parse_mapping,
    read,
)
from mergekit_lit.cli.saving import merged_values
from mergekit_lit.cli.train import train_parser
from mergekit_lit.core.files import write_text
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.search.sweeping.axes import read_axes
from mergekit_lit.search.sweeping.plan import Plan, plan_runs
from mergekit_lit.search.sweeping.sweep import LauncherName, SweepResult, run_sweep

_USAGE = "FILE.yaml [--out FOLDER] [--jobs N] [--dry_run] [--key VALUE of the job ...]"
_JOBS = {"train": (TrainJob, train_parser)}
_SOME_FAILED = 1


# Each argument is one flag of the command line, hence so many.
def options(
    *,
    out: Path,
    axes: dict[str, Any] | list[dict[str, Any]],
    job: str = "train",
    launcher: LauncherName = "local",
    jobs: int | None = None,
    retries: int = 2,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Say what is swept, and where. All other keys are the job's: `mergekit-lit train --help`.

    Args:
        out: the sweep's folder: `runs/<name>/` for each run, `results.csv`, `sweep.record.json`.
            The same command goes on where a killed one stopped; several may run at once.
        axes: keys of the job and what to try for each: `model.lr: [0.01, 0.03]` (every value with
            every other), `{list: [...]}` (value by value with other lists), or
            `{random: {low: 1e-4, high: 1e-1, log: true, samples: 20, seed: 0}}`; or several such
            mappings in a list.
        job: what is done at each point: `train`.
        launcher: where workers run: `local`, on this machine.
        jobs: workers, each of one thread and with a core or GPU of its own; null for one a core.
        retries: how often a run that failed, or whose process died, is tried again; errors of input
            are not.
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
    job = _JOBS[made.job][0](given)
    plan = plan_runs(read_axes(settings["axes"]), job)
    if made.dry_run:
        _print_plan(plan, as_json=made.json)
        return 0
    result = run_sweep(
        plan,
        job,
        out=made.out,
        launcher=made.launcher,
        jobs=made.jobs or len(os.sched_getaffinity(0)),
        retries=made.retries,
        config=merged_values(given, settings),
        quiet=made.json,
    )
    write_text(made.out / "sweep.yaml", yaml.safe_dump({**settings, **given}, sort_keys=False))
    if made.json:
        print_json(vars(result.record))
    else:
        _print(plan, result)
    return _SOME_FAILED if result.outcome.failed else 0


def _parser() -> ArgumentParser:
    parser = command_parser("sweep", COMMANDS["sweep"], usage=_USAGE)
    add_parameters(parser, options)
    return parser


def _given(own: ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what file and flags say: the sweep's own values, and those of its job."""
    files = [word for word in argv if word.endswith((".yaml", ".yml"))]
    values: dict[str, Any] = {}
    for path in files:
        values = merged_values(values, load_yaml(path.removeprefix("--config=")))
    if not files:
        raise ValueError("A sweep must be given as a YAML file: mergekit-lit sweep FILE.yaml.")
    given = read(_of_both(own, str(values.get("job", "train"))), argv)
    for word in given.positionals:
        if word not in files:
            raise ValueError(f"A sweep must be given as a YAML file, but {word!r} is none.")
    for key, text in given.options:
        value = True if text is None else yaml.safe_load(text)
        values = merged_values(values, nested({key.removesuffix("+"): value}))
    ours = {action.dest for action in own._actions} - {"help", "config"}
    mine = {key: value for key, value in values.items() if key in ours}
    return mine, {key: value for key, value in values.items() if key not in ours}


def _of_both(own: ArgumentParser, job: str) -> ArgumentParser:
    """Return a parser that knows the flags of the job, and those of the sweep."""
    if job not in _JOBS:
        raise ValueError(unknown_name("job", job, _JOBS))
    both = _JOBS[job][1]()
    known = {action.dest for action in both._actions}
    for action in own._actions:
        if action.dest not in known:
            both._add_action(action)
    return both


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    told = {"runs": len(plan.runs), "results": plan.results, "shared": plan.shared}
    if as_json:
        print_json(told)
        return
    print_table([told], {name: name for name in told})


def _print(plan: Plan, result: SweepResult) -> None:
    rows = [{"run": name, "error": error} for name, error in result.outcome.failed.items()]
    if rows:
        print_table(rows, {"run": "failed", "error": "error"})
    done = len(result.outcome.done)
    print(f"{done} of {len(plan.runs)} runs are done. Results: {result.table}")
