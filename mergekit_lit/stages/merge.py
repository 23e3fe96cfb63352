"""This file is the merge stage: expert files in, one merged model with its record out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mergekit_lit.core.experts import Base, Experts, Merged, save_merged
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, unknown_name
from mergekit_lit.lit.recalibration import (
    ImagesBySplit,
    Veneers,
    images_by_split,
    merge_calibrated,
    splits_needed,
)
from mergekit_lit.lit.wandb_runs import LoggerKind, Outcome, RunFacts, check_logger, log_run
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.merging.gather import load_experts
from mergekit_lit.merging.images import check_shown
from mergekit_lit.merging.patterns import select
from mergekit_lit.merging.plan import Plan, plan
from mergekit_lit.merging.precision import ComputeDtype, OutputDtype
from mergekit_lit.merging.raw import HEADS, load_raw, save_raw
from mergekit_lit.stages.folders import check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import architecture_of, base_of, fingerprint, is_plain

if TYPE_CHECKING:
    from mergekit_lit.models.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is merged how.

    Attributes:
        method: name of a registered merge method.
        config: values for the method's parameters; the others keep their defaults.
        batch_norm: the merged model's BatchNorm statistics: the `base`'s, the `average` of the
            experts', or estimated again on training images of all tasks together (`recalibrate`)
            or of each task for itself (`recalibrate-per-task`).
        veneers: names and configs of veneers: what acts on the experts before the method, or on its
            result after it.
        include: patterns of the tensors to merge; none means all.
        exclude: patterns of those that stay the base's, even if they are included.
        dtype: number type of the computation, `float32` or `float64`; None is float32, or the
            base's where that is better.
        out_dtype: number type of the result; `base` is each tensor's own in the base.
        seed: of methods that draw at random, and of the images that statistics are estimated on.
    """

    method: str = "average"
    config: Mapping[str, Any] = field(default_factory=dict)
    veneers: Veneers = ()
    batch_norm: BatchNormPolicy = "base"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: ComputeDtype | None = None
    out_dtype: OutputDtype = "base"
    seed: int = 0


@dataclass(frozen=True)
class MergeResult:
    """What one merge wrote.

    Attributes:
        path: the merged model.
        record_path: its record, beside it.
        record: the same, in memory.
    """

    path: Path
    record_path: Path
    record: Record


# Each argument is one choice of the merge, hence so many.
def merge_files(  # noqa: PLR0913
    experts: Sequence[Path],
    *,
    out: Path,
    recipe: Recipe | None = None,
    base: str | None = None,
    allow_different_base: bool = False,
    heads: str = HEADS,
    calibration: Calibration | None = None,
    observers: Sequence[MergeObserver] = (),
    max_shard_bytes: int | None = None,
    logger: LoggerKind = "csv",
) -> MergeResult:
    """Merge expert files into one file, with a record beside it; write both or neither.

    Where the base is a file of weights that others wrote, the experts are such files too, of which
    nothing is known but names and shapes; so is the result (`merging.raw`).

    Args:
        experts: one file per expert, each of another task, all of one base.
        out: the merged model's file, ending in `.safetensors`.
        recipe: what is merged how; the plain average by default.
        base: spec of the base, as `load_base` takes it, or a plain weight file; the one that the
            first card names by default.
        allow_different_base: take experts whose card names another base, or none.
        heads: pattern of the tensors of plain files that are not merged but kept for each expert.
        calibration: images for methods that look at some, and for the `recalibrate` policies.
        observers: see every tensor's deltas; what their `to_json` returns goes to the record.
        max_shard_bytes: write several files of at most so many bytes, and an index; None writes
            one.
        logger: `csv` (the record alone), `wandb` (offline) or `wandb-online`: one run with the
            merged model as its artifact.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method, parameter, suite or task.
        TypeError: a parameter of the wrong type.
        ValueError: experts that cannot be merged, or a value out of range.
        OSError: `out` cannot be written.
    """
    watch = Stopwatch()
    recipe = recipe or Recipe()
    paths = [Path(path) for path in experts]
    out = _checked_out(Path(out))
    record_path = out.with_suffix(".record.json")
    check_record(record_path, "merge")
    _check_recipe(recipe, calibration)
    check_logger(logger)
    plain = is_plain(base)
    found = None if plain else base_of(paths, base)
    _check_no_input(out, [*paths, *_files_of(found.name if found else str(base))])
    gathered = _gathered(paths, recipe, found or str(base), heads, allow_different_base)
    images = _images(gathered, recipe, calibration, plain=plain)
    backbone = architecture_of(found) if found and images else None
    merged = merge_recipe(
        gathered, recipe, backbone, images, observers=observers, streamed=not observers
    )
    inputs = {str(path): fingerprint(path, plain=plain) for path in paths}
    record = _record(recipe, calibration, inputs, out, merged, observers)
    save = save_raw if plain else save_merged
    # Each is written atomically; should the second fail, an earlier pair stays whole.
    with _restored_on_error(record_path):
        record.write(record_path)
        save(out, merged, max_shard_bytes=max_shard_bytes)
        # Tensors are merged as they are written, so that the time is known only now.
        watch.finish(record).write(record_path)
    _tell_wandb(record, out, merged, logger)
    return MergeResult(out, record_path, record)


def plan_files(
    experts: Sequence[Path],
    *,
    recipe: Recipe | None = None,
    base: str | None = None,
    allow_different_base: bool = False,
    heads: str = HEADS,
) -> Plan:
    """Tell what `merge_files` would do with the same arguments, by the files' headers alone.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method or parameter.
        TypeError: a parameter of the wrong type.
        ValueError: experts that cannot be merged, or a value out of range.
    """
    recipe = recipe or Recipe()
    paths = [Path(path) for path in experts]
    found = str(base) if is_plain(base) else base_of(paths, base)
    gathered = _gathered(paths, recipe, found, heads, allow_different_base, headers_only=True)
    return plan(
        gathered,
        recipe.method,
        config=recipe.config,
        batch_norm=recipe.batch_norm,
        seed=recipe.seed,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
    )


def _gathered(
    paths: Sequence[Path],
    recipe: Recipe,
    base: Base | str,
    heads: str,
    allow_different_base: bool,  # noqa: FBT001 - passed on
    *,
    headers_only: bool = False,
) -> Experts:
    """Open experts of a base, or plain files of a plain one, and choose the tensors to merge."""
    if isinstance(base, str):
        experts = load_raw(paths, base=Path(base), heads=heads)
    else:
        experts = load_experts(
            paths, base=base, allow_different_base=allow_different_base, headers_only=headers_only
        )
    return select(experts, include=recipe.include, exclude=recipe.exclude)


def merge_recipe(
    experts: Experts,
    recipe: Recipe,
    backbone: "Backbone | None",
    images: ImagesBySplit,
    *,
    observers: Sequence[MergeObserver] = (),
    streamed: bool = False,
) -> Merged:
    """Merge in memory by a recipe; nothing is read from or written to disk.

    Args:
        experts: T experts of one base.
        recipe: method, its configuration, BatchNorm policy and seed.
        backbone: a module of the experts' architecture; never changed. None where no images are
            looked at.
        images: images of each task by split, as `merge_calibrated` takes them.
        observers: see every tensor's deltas.
        streamed: make each tensor when it is asked for, as `merging.engine.merge` does.

    Raises:
        KeyError: unknown method, parameter or policy, or a task without images.
        TypeError: a parameter of the wrong type.
        ValueError: a value out of range.
    """
    return merge_calibrated(
        experts,
        recipe.method,
        images,
        backbone=backbone,
        config=recipe.config,
        veneers=recipe.veneers,
        batch_norm=recipe.batch_norm,
        observers=observers,
        seed=recipe.seed,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        streamed=streamed,
    )


@contextmanager
def _restored_on_error(path: Path) -> Iterator[None]:
    """Leave a small file as it was, or absent as it was, if the block fails."""
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink() if before is None else path.write_bytes(before)
        raise


def _checked_out(out: Path) -> Path:
    """Return `out` if it can be the result's name."""
    if out.suffix != ".safetensors":
        raise ValueError(f"`out` must end in .safetensors, but is {str(out)!r}.")
    if out.is_dir():
        raise ValueError(f"`out` must name a file, but {str(out)!r} is a folder.")
    return out


def _files_of(base: str) -> list[Path]:
    """Return the file or folder of a base that is one: `FILE`, `backbone@FILE` or plain weights."""
    place = Path(base.rpartition("@")[2])
    return [place] if place.is_file() or is_plain(base) else []


def _check_no_input(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to overwrite an expert or the base, or to write into a folder that is one of them."""
    place = out.resolve()
    if not {place, place.parent}.isdisjoint(path.resolve() for path in inputs):
        raise ValueError(
            f"`out` must be a new file, but {str(out)!r} is one of the experts or the base."
        )


def _check_recipe(recipe: Recipe, calibration: Calibration | None) -> None:
    """Refuse, before anything is read, unknown names and values, and what lacks its images."""
    method = MERGE_METHODS.get(recipe.method)
    resolve(method, recipe.config)
    veneers = [VENEERS.get(name) for name, _ in recipe.veneers]
    for veneer, (_, config) in zip(veneers, recipe.veneers, strict=True):
        resolve(veneer, config)
    known = get_args(BatchNormPolicy)
    if recipe.batch_norm not in known:
        raise KeyError(unknown_name("BatchNorm policy", recipe.batch_norm, known))
    if recipe.batch_norm.startswith("recalibrate") and calibration is None:
        raise ValueError(
            f"`batch_norm` {recipe.batch_norm!r} must be told a suite to take training images "
            "from, but got none. Name the suite, or use 'base' or 'average'."
        )
    if calibration is None:
        for entry in (method, *veneers):
            check_shown(entry, None)
    elif calibration.images < 2:
        raise ValueError(
            f"`images` must be at least 2, to have a variance, but is {calibration.images}."
        )


def _images(
    experts: Experts, recipe: Recipe, calibration: Calibration | None, *, plain: bool
) -> ImagesBySplit:
    """Return the images that the recipe needs, by split and task; none where it needs none."""
    needed = splits_needed(recipe.method, recipe.batch_norm, experts.structure, recipe.veneers)
    if calibration is None or not needed:
        return {}
    if plain:
        raise ValueError(
            f"{recipe.method!r} with `batch_norm` {recipe.batch_norm!r} looks at images, for which "
            "it needs a network, but plain weight files name none. Merge experts of mergekit-lit."
        )
    tasks = calibration.tasks(experts.names)
    return images_by_split(tasks, needed, count=calibration.images, seed=recipe.seed)


def _tell_wandb(record: Record, out: Path, merged: Merged, logger: LoggerKind) -> None:
    """Tell W&B the merge, if asked: its facts, its coefficients, and the model as an artifact."""
    coefficients = merged.facts.get("coefficients") or [None] * len(merged.tasks)
    facts = RunFacts(
        name=record.name,
        job=record.stage,
        group=out.resolve().parent.name,
        tags=[merged.facts["method"], merged.facts["base"]],
        config=record.config,
    )
    outcome = Outcome(
        summary=merged.facts,
        rows=[
            {"task": task, "coefficient": coefficient}
            for task, coefficient in zip(merged.tasks, coefficients, strict=True)
        ],
        files={out: merged.facts},
        kind="merged",
    )
    log_run(logger, out.parent / "logs" / out.stem, facts, outcome)


def _record(
    recipe: Recipe,
    calibration: Calibration | None,
    inputs: Mapping[str, str],
    out: Path,
    merged: Merged,
    observers: Sequence[MergeObserver],
) -> Record:
    seen = {type(o).__name__: o.to_json() for o in observers if hasattr(o, "to_json")}
    return Record(
        stage="merge",
        name=out.stem,
        config={
            "experts": list(inputs),
            "recipe": asdict(recipe) | {key: merged.facts[key] for key in ("config", "veneers")},
            "calibration": asdict(calibration) if calibration else None,
            "base": merged.facts["base"],
            "observers": [f"{type(o).__module__}.{type(o).__qualname__}" for o in observers],
        },
        inputs=inputs,
        seeds={"merge": recipe.seed},
        metrics={"merged": dict(merged.facts), "observers": seen},
        outputs=[str(out)],
    )
