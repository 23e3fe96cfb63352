"""This file is the merge stage: expert files in, one merged model with its record out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lit.core.expert_files import save_merged
from mergekit_lit.core.experts import Base, Experts, Merged
from mergekit_lit.core.files import together
from mergekit_lit.core.merging import MergeObserver
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.core.shards import check_shard_size
from mergekit_lit.lit.run_facts import LoggerKind, Outcome, base_model, file_model
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.merging.gather import load_experts, read_through
from mergekit_lit.merging.patterns import select
from mergekit_lit.merging.plan import Plan, plan
from mergekit_lit.merging.raw import HEADS, load_raw, save_raw
from mergekit_lit.stages.advice import base_cautions, expert_cautions, merge_cautions
from mergekit_lit.stages.folders import check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import architecture_of, base_of, fingerprint, is_plain
from mergekit_lit.stages.recipes import Recipe, check_fit, check_recipe, images_for, merge_recipe
from mergekit_lit.stages.run_groups import facts_of_run, used_files


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
        logger: `csv` (the record alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one
            run with the merged model as its artifact, made from those of base and experts.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method, parameter, suite or task.
        TypeError: a parameter of the wrong type.
        ValueError: experts that cannot be merged, or a value out of range.
        OSError: `out` cannot be written.
    """
    watch = Stopwatch()
    recipe = recipe or Recipe()
    paths, out = [Path(path) for path in experts], Path(out)
    check_logger(logger)
    gathered, found = _opened(
        paths,
        out,
        recipe,
        base,
        heads,
        calibration,
        allow_different_base=allow_different_base,
        max_shard_bytes=max_shard_bytes,
    )
    plain, record_path = found is None, _record_path(out)
    if not plain:
        gathered = read_through(gathered)
    images = images_for(gathered, recipe, calibration)
    backbone = architecture_of(found) if found and images else None
    merged = merge_recipe(
        gathered, recipe, backbone, images, observers=observers, streamed=not observers
    )
    inputs = {str(path): fingerprint(path, plain=plain) for path in paths}
    choices = {
        "allow_different_base": allow_different_base,
        "heads": heads if plain else None,
        "max_shard_bytes": max_shard_bytes,
    }
    record = _record(recipe, calibration, inputs, out, merged, observers, choices)
    record.metrics["warnings"] = [] if plain else base_cautions(paths) + expert_cautions(paths)
    save = save_raw if plain else save_merged
    # Should one fail, what an earlier merge left stays whole.
    with together():
        # Tensors are merged as they are written, so that the time is known only afterwards.
        save(out, merged, max_shard_bytes=max_shard_bytes)
        record.metrics["warnings"] += merge_cautions(merged.facts)
        watch.finish(record).write(record_path)
    if logger != "csv":
        _track(record, out, merged, found, logger)
    return MergeResult(out, record_path, record)


def plan_files(
    experts: Sequence[Path],
    *,
    out: Path,
    recipe: Recipe | None = None,
    base: str | None = None,
    allow_different_base: bool = False,
    heads: str = HEADS,
    calibration: Calibration | None = None,
    max_shard_bytes: int | None = None,
) -> Plan:
    """Tell what `merge_files` would do with the same arguments, by the files' headers alone.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method, veneer or parameter.
        TypeError: a parameter of the wrong type.
        ValueError: experts that cannot be merged, or a value out of range.
    """
    recipe = recipe or Recipe()
    gathered, _ = _opened(
        [Path(path) for path in experts],
        Path(out),
        recipe,
        base,
        heads,
        calibration,
        allow_different_base=allow_different_base,
        max_shard_bytes=max_shard_bytes,
    )
    return plan(
        gathered,
        recipe.method,
        config=recipe.config,
        veneers=recipe.veneers,
        batch_norm=recipe.batch_norm,
        seed=recipe.seed,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
    )


def _opened(
    paths: Sequence[Path],
    out: Path,
    recipe: Recipe,
    base: str | None,
    heads: str,
    calibration: Calibration | None,
    *,
    allow_different_base: bool,
    max_shard_bytes: int | None,
) -> tuple[Experts, Base | None]:
    """Open what is merged by its headers, and refuse all that can be refused by these.

    Returns:
        The experts, with the tensors to merge chosen; and their base, None of plain files.
    """
    _check_out(out, max_shard_bytes)
    check_recipe(recipe, calibration)
    plain = is_plain(base)
    found = None if plain else base_of(paths, base)
    _check_no_input(out, [*paths, *_files_of(found.name if found else str(base))])
    if found is None:
        experts = load_raw(paths, base=Path(str(base)), heads=heads)
    else:
        experts = load_experts(
            paths, base=found, allow_different_base=allow_different_base, headers_only=True
        )
    experts = select(experts, include=recipe.include, exclude=recipe.exclude)
    check_fit(recipe, experts, calibration, plain=plain)
    return experts, found


def _check_out(out: Path, max_shard_bytes: int | None) -> None:
    """Refuse a name that the result cannot have, and shards of no size."""
    if out.suffix != ".safetensors":
        raise ValueError(f"`out` must end in .safetensors, but is {str(out)!r}.")
    if out.is_dir():
        raise ValueError(f"`out` must name a file, but {str(out)!r} is a folder.")
    if max_shard_bytes is not None:
        check_shard_size(max_shard_bytes)
    check_record(_record_path(out), "merge")


def _record_path(out: Path) -> Path:
    return out.with_suffix(".record.json")


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


def _track(
    record: Record, out: Path, merged: Merged, base: Base | None, logger: LoggerKind
) -> None:
    """Tell of the merge: its facts, its coefficients, and the model with what it is made from."""
    facts = dict(merged.facts)
    coefficients = facts.get("coefficients") or [None] * len(merged.tasks)
    suite = (record.config["calibration"] or {}).get("suite")
    tags = [facts["method"], facts["base"], *([Path(suite).name] if suite else [])]
    outcome = Outcome(
        summary=facts,
        # Flat, to filter by: first what the merged model says of itself, then the parameters.
        config=facts | facts["config"],
        tables={
            "coefficients": [
                {"task": task, "coefficient": coefficient}
                for task, coefficient in zip(merged.tasks, coefficients, strict=True)
            ]
        },
        used=[*([base_model(base)] if base else []), *used_files(record.inputs)],
        made=[file_model(out, "merged", facts)],
    )
    told = facts_of_run(record.stage, record.name, out.parent, tags=tags, config=record.config)
    log_run(logger, out.parent / "logs" / out.stem, told, outcome)


def _record(
    recipe: Recipe,
    calibration: Calibration | None,
    inputs: Mapping[str, str],
    out: Path,
    merged: Merged,
    observers: Sequence[MergeObserver],
    choices: Mapping[str, Any],
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
            **choices,
            "observers": [f"{type(o).__module__}.{type(o).__qualname__}" for o in observers],
        },
        inputs=inputs,
        seeds={"merge": recipe.seed},
        metrics={"merged": dict(merged.facts), "observers": seen},
        outputs=[str(out)],
    )
