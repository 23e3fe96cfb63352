"""This file is `mergekit-lit merge`: expert files in, one merged model out.

It is parsed in two passes: the first finds the method, the second knows that method's own flags.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.calibration import calibration
from mergekit_lit.cli.method_flags import add_method, method_named, observer_of, recipe_of
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import (
    add_parameters,
    command_parser,
    instantiated,
    parse,
)
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.merging.configuration import parameters
from mergekit_lit.merging.plan import Plan
from mergekit_lit.merging.precision import ComputeDtype, OutputDtype
from mergekit_lit.merging.raw import HEADS
from mergekit_lit.stages.merge import MergeResult, merge_files, plan_files
from mergekit_lit.stages.recipes import Recipe

_SIZES = ("read_bytes", "written_bytes", "streamed_bytes", "peak_bytes")
_USAGE = "EXPERT ... --out FILE [--method NAME [its flags]] [options]"


# Each argument is one flag of the command line, hence so many.
def merge(  # noqa: PLR0913
    experts: list[Path],
    *,
    out: Path,
    method: str = "average",
    then: list[str | dict[str, Any]] | None = None,
    batch_norm: BatchNormPolicy = "base",
    seed: int = 0,
    base: str | None = None,
    allow_different_base: bool = False,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    heads: str = HEADS,
    dtype: ComputeDtype | None = None,
    out_dtype: OutputDtype = "base",
    max_shard_bytes: int | None = None,
    callbacks: list[str | dict[str, Any]] | None = None,
    logger: LoggerKind = "csv",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Merge experts.

    Args:
        experts: one file per expert, each of another task, all of one base.
        out: the merged model's file, ending in .safetensors; its record is written beside it.
        method: how to merge; `mergekit-lit methods` lists them, and `--method NAME --help` shows
            the flags of one.
        then: veneers, such as `--then lines --then repair`: what is done to the experts before the
            method or to its result after it; with parameters `{name: lines, config: {alpha: 0.2}}`.
        batch_norm: BatchNorm statistics of the merged model: the `base`'s, the `average` of the
            experts', or estimated again on training images of `data.suite`, for all tasks
            together (`recalibrate`) or for each (`recalibrate-per-task`).
        seed: seed of methods that draw at random, and of the images for statistics.
        base: the base, if not the one that the first card names; with a file or folder of plain
            weights the experts may be such too, of any architecture.
        allow_different_base: whether to take experts whose card names another base, or none.
        include: patterns of the tensors to merge, such as `blocks.*.attn.*`; all by default.
        exclude: patterns of the tensors that stay the base's.
        heads: pattern of the tensors of plain weights that are not merged, but kept for each.
        dtype: number type to compute in; null is float32 or the base's better.
        out_dtype: number type of the result; `base` is each tensor's own.
        max_shard_bytes: write several files of at most so many bytes, and an index of them.
        callbacks: observers of the merge by class path, such as
            `mergekit_lit.callbacks.DeltaGeometry`, or `{class_path: ..., init_args: {...}}`; they
            see the deltas and may change them.
        logger: `csv` (the record alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one
            run with the merged model as its artifact.
        dry_run: whether to tell what would be done, by the files' headers, and do nothing.
        json: whether to print the record, or what would be done, as JSON.
    """


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser, flags = merge_parser(method_named(argv))
    namespace = parse(parser, argv, positional="experts")
    texts = config_texts(parser, argv, namespace, positional="experts")
    made = instantiated(parser, namespace)
    recipe = recipe_of(made, flags)
    if made.dry_run:
        _print_plan(_planned(made, recipe), as_json=made.json)
        return 0
    result = merged_files(made, recipe)
    write_config(texts, result.path.with_suffix(".config"))
    if made.json:
        print_json(vars(result.record))
    else:
        _print(result)
    return 0


def merge_parser(method: str) -> tuple[ArgumentParser, list[str]]:
    """Return the parser of `merge` with the flags of one method, and their names.

    Raises:
        KeyError: no such method.
    """
    function = MERGE_METHODS.get(method).function
    flags = list(parameters(function))
    parser = command_parser("merge", COMMANDS["merge"], usage=_USAGE)
    # Where errors send the user: the page that shows this method's flags.
    parser.prog = f"{parser.prog} --method {method}"
    ours = add_parameters(parser, merge, skip=set(flags) & {"seed"})
    clash = sorted(set(ours) & set(flags))
    if clash:
        raise ValueError(
            f"Parameters of {function.__name__!r} must not be named like those of `merge`, but "
            f"{clash[0]!r} is. Rename it."
        )
    add_method(parser, function)
    parser.add_function_arguments(calibration, "data")
    return parser, flags


def merged_files(made: Namespace, recipe: Recipe) -> MergeResult:
    """Merge the files that objects describe, as a recipe says."""
    return merge_files(
        made.experts,
        out=made.out,
        recipe=recipe,
        base=made.base,
        allow_different_base=made.allow_different_base,
        heads=made.heads,
        calibration=calibration(**vars(made.data)),
        observers=[observer_of(given) for given in made.callbacks or ()],
        max_shard_bytes=made.max_shard_bytes,
        logger=made.logger,
    )


def _planned(made: Namespace, recipe: Recipe) -> Plan:
    for given in made.callbacks or ():
        observer_of(given)
    return plan_files(
        made.experts,
        out=made.out,
        recipe=recipe,
        base=made.base,
        allow_different_base=made.allow_different_base,
        heads=made.heads,
        calibration=calibration(**vars(made.data)),
        max_shard_bytes=made.max_shard_bytes,
    )


def _print(result: MergeResult) -> None:
    facts = result.record.metrics["merged"]
    coefficients = facts.get("coefficients") or [None] * len(facts["tasks"])
    rows = [
        {"task": task, "coefficient": coefficient}
        for task, coefficient in zip(facts["tasks"], coefficients, strict=True)
    ]
    print_table(rows, {"task": "task", "coefficient": "coefficient"})
    for warning in result.record.metrics["warnings"]:
        print(f"warning: {warning}")
    print(f"{facts['method']}, BatchNorm {facts['batch_norm']}: {result.path}")


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
        return
    rows = [
        vars(row) | {"values": [f"{k} {v}" for k, v in row.values.items()]} for row in plan.rows
    ]
    veneers = ["veneers"] if plan.veneers else []
    names = ("name", "fate", "shape", "dtype", "out_dtype", "values", *veneers)
    print_table(rows, {name: name for name in names})
    size = {name: f"{getattr(plan, name) / 1e6:,.1f} MB" for name in _SIZES}
    seconds = "unknown" if plan.seconds is None else f"{plan.seconds:.1f} s"
    before, after = (
        [veneer["name"] for veneer in plan.veneers if veneer["position"] == position]
        for position in ("before", "after")
    )
    chain = ", then ".join([*before, plan.method, *after])
    print(
        f"{chain}, BatchNorm {plan.batch_norm}: reads {size['read_bytes']}, writes "
        f"{size['written_bytes']}; about {size['streamed_bytes']} of memory ({size['peak_bytes']} "
        f"with images or callbacks) and {seconds} of one processor's time (estimates)."
    )
