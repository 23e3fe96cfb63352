"""This file is `mergekit-lit merge`: expert files in, one merged model out.

It is parsed in two passes: the first finds the method, the second knows that method's own flags.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from jsonargparse import ArgumentParser, Namespace

from mergekit_lit.cli import COMMANDS
from mergekit_lit.cli.output import print_json, print_table
from mergekit_lit.cli.parsing import (
    add_parameters,
    command_parser,
    instantiated,
    load_yaml,
    parse,
    values_of,
)
from mergekit_lit.cli.saving import config_texts, write_config
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.lit.recalibration import CALIBRATION_IMAGES
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.merging.configuration import accepts, parameter_help, parameters
from mergekit_lit.merging.plan import Plan
from mergekit_lit.merging.precision import ComputeDtype, OutputDtype
from mergekit_lit.merging.raw import HEADS
from mergekit_lit.stages.images import Calibration
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


# Each argument is one flag of the command line, hence so many.
def calibration(  # noqa: PLR0913
    *,
    suite: str | None = None,
    root: Path | None = None,
    images: int = CALIBRATION_IMAGES,
    n: int | None = None,
    train_share: float = 1.0,
    val_share: float = 0.1,
    reserve: int = 64,
    split_seed: int = 0,
    size: int | None = None,
    download: bool = False,
) -> Calibration | None:
    """Say where the images come from that a method looks at, or BatchNorm statistics are made of.

    Args:
        suite: suite, or folder of tasks, whose images the method looks at, if any, and whose
            training images the `recalibrate` policies use.
        root: folder of the downloaded data sets; null for the default one.
        images: largest number of images of one task, at least 2.
        n: number of training samples that the experts used; null for all.
        train_share: share of the training samples that the experts used, in (0, 1].
        val_share: share of the training samples carved out for validation, in [0, 1).
        reserve: training samples carved out that no run trains on.
        split_seed: seed of the carve-outs and the subset.
        size: largest side to which images are decoded, in pixels; null keeps the source's.
        download: whether missing images may be fetched.

    Raises:
        ValueError: images are described, but no suite is named.
    """
    if suite is None:
        _refuse_homeless(locals())
        return None
    splits = SplitOptions(
        val_share=val_share, reserve=reserve, train_share=train_share, n=n, seed=split_seed
    )
    return Calibration(
        suite=suite, root=root, options=splits, images=images, size=size, download=download
    )


def _refuse_homeless(given: Mapping[str, Any]) -> None:
    """Refuse values of `--data.*` that would do nothing, since no suite is named."""
    for name, parameter in inspect.signature(calibration).parameters.items():
        if given[name] != parameter.default:
            raise ValueError(
                f"`data.{name}` must come with `data.suite`, whose images it describes, but there "
                "is none. Name the suite, or leave it out."
            )


def veneers(given: Sequence[str | dict[str, Any]] | None) -> list[tuple[str, dict[str, Any]]]:
    """Return the names of veneers, and values for their parameters, that `--then` holds."""
    return [_veneer(each) for each in given or ()]


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


def method_named(argv: Sequence[str]) -> str:
    """Return the method that the flags name, or else the last file that names one."""
    name = "average"
    for path in values_of(argv, "config"):
        name = str(load_yaml(path).get("method", name))
    return [name, *values_of(argv, "method")][-1]


def methods_named(argv: Sequence[str]) -> list[str]:
    """Return the methods named, one or several with commas between, before flags are known."""
    return [name.strip(" []'\"") for name in method_named(argv).split(",")]


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


def add_method(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    """Make each parameter of a method a flag that takes values by pattern and depth too."""
    words = parameter_help(function)
    group = parser.add_argument_group((function.__doc__ or "").split("\n")[0].rstrip("."))
    for name, parameter in parameters(function).items():
        required = parameter.default is inspect.Parameter.empty
        group.add_argument(
            f"--{name}",
            type=_by_tensor(parameter.annotation),
            default=None if required else parameter.default,
            required=required,
            help=words.get(name),
        )


def _by_tensor(annotation: Any) -> Any:
    """Return the type of a parameter whose value may differ from tensor to tensor."""
    gradient = [list[float]] if accepts(annotation, 0.5) else []
    # Of the forms by pattern, the list is the one that records hold.
    return Union[(annotation, *gradient, dict[str, Any], list[dict[str, Any]])]


def recipe_of(made: Namespace, flags: Sequence[str]) -> Recipe:
    """Return what the flags say of the merge itself; number types where the command has them."""
    return Recipe(
        method=made.method,
        config={flag: made[flag] for flag in flags},
        veneers=veneers(made.then),
        batch_norm=made.batch_norm,
        include=made.include or (),
        exclude=made.exclude or (),
        dtype=made.get("dtype"),
        out_dtype=made.get("out_dtype", "base"),
        seed=made.seed,
    )


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
        observers=[_observer(given) for given in made.callbacks or ()],
        max_shard_bytes=made.max_shard_bytes,
        logger=made.logger,
    )


def _planned(made: Namespace, recipe: Recipe) -> Plan:
    for given in made.callbacks or ():
        _observer(given)
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


def _veneer(given: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a veneer and values for its parameters."""
    if isinstance(given, str):
        return given, {}
    name, config = given.get("name"), given.get("config", {})
    if set(given) - {"name", "config"} or not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(
            f"`then` must hold names of veneers, or `name` and `config` of each, but is {given!r}."
        )
    return name, config


def _observer(given: str | dict[str, Any]) -> MergeObserver:
    """Return an observer of the class that `given` names.

    It is not typed as `MergeCallback`: that would import Lightning, which merging does not need.
    """
    path = given if isinstance(given, str) else str(given.get("class_path", ""))
    arguments = {} if isinstance(given, str) else given.get("init_args", {})
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            "`callbacks` must name classes by their path, such as "
            "mergekit_lit.callbacks.DeltaGeometry, or hold `class_path` and `init_args` of each, "
            f"but one is {given!r}."
        )
    try:
        made = getattr(importlib.import_module(module), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`callbacks` must name classes by their path, but {path!r}: {error}"
        ) from None
    if not hasattr(made, "on_merge_tensor"):
        raise TypeError(
            f"`callbacks` must be observers of merging, but {path!r} has no `on_merge_tensor`. "
            "Derive it from mergekit_lit.callbacks.MergeCallback."
        )
    observer: MergeObserver = made
    return observer


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
