"""This file compares the bounds of several merges of the same experts: records, page, W&B."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.records import Record
from mergekit_lit.lit.run_facts import LoggerKind, Outcome
from mergekit_lit.lit.tracking import check_logger, log_run
from mergekit_lit.stages.bound import bound_files, check_bound
from mergekit_lit.stages.folders import check_folder, check_no_file_name, check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe, check_methods
from mergekit_lit.stages.report import build_report
from mergekit_lit.stages.run_groups import facts_of_run, used_files
from mergekit_lit.theory.effort import Effort


def compare_bounds(
    experts: Sequence[Path],
    recipes: Sequence[Recipe],
    *,
    base: str | None = None,
    calibration: Calibration | None = None,
    effort: Effort | None = None,
    refits: bool = False,
    out: Path | None = None,
    logger: LoggerKind = "csv",
) -> list[Record]:
    """Tell every term of the bound for several merges of the same experts.

    Args:
        experts: one file per expert, each of another task, all of one base.
        recipes: at least one, each of another method.
        base: as of `bound_files`; so are the next three.
        calibration: where the images come from.
        effort: how much is looked at.
        refits: whether to merge the refits too.
        out: folder of `<method>.record.json` and of the page `report.html`, which compares them; or
            the record's file, ending in `.json`, for one recipe alone. None writes nothing.
        logger: `csv` (the files alone), `tensorboard`, `wandb` (offline) or `wandb-online`: one run
            with every term as its summary, and as a table.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method, parameter, suite or task.
        ValueError: experts that cannot be merged, other images than those trained on, two recipes
            of one method, or a value out of range.
    """
    out = None if out is None else Path(out)
    paths = _paths(recipes, out)
    for recipe, path in zip(recipes, paths, strict=True):
        check_bound(recipe, calibration)
        if path is not None:
            check_record(path, "bound")
    # A file alone is one merge's: W&B's files go beside it.
    folder = out.parent if out is not None and out.suffix == ".json" else out
    check_logger(logger, folder)
    records = [
        bound_files(
            experts,
            recipe=recipe,
            base=base,
            calibration=calibration,
            effort=effort,
            refits=refits,
            out=path,
        )
        for recipe, path in zip(recipes, paths, strict=True)
    ]
    if folder is not None:
        if folder == out:
            build_report(folder, title="What bounds the excess error")
        if logger != "csv":
            _track(records, folder, logger)
    return records


def _paths(recipes: Sequence[Recipe], out: Path | None) -> list[Path | None]:
    """Return where each record goes, or refuse names that clash."""
    names = check_methods(recipes)
    if out is None:
        return [None] * len(names)
    if out.suffix == ".json":
        if len(names) > 1:
            raise ValueError(
                f"`out` must be a folder for the records of {len(names)} methods, but is "
                f"{str(out)!r}."
            )
        return [out]
    check_no_file_name(out)
    check_folder(out)
    return [out / f"{name}.record.json" for name in names]


def _track(records: Sequence[Record], folder: Path, logger: LoggerKind) -> None:
    """Tell of the merges: their terms as summary and as a table, and each expert's part."""
    names = [record.name for record in records]
    totals = {
        record.name: {name: record.metrics["bound"][name] for name in ("total", "total_by_step")}
        for record in records
    }
    rows = list(_rows(records))
    for row in rows:
        totals[row["method"]][row["name"]] = row["value"]
    experts = [
        {"method": record.name, **row} for record in records for row in record.metrics["experts"]
    ]
    outcome = Outcome(
        summary=totals,
        tables={"terms": rows, "experts": experts},
        used=used_files(records[0].inputs),
    )
    config = {record.name: record.config for record in records}
    told = facts_of_run("bound", "bound", folder, tags=names, config=config)
    log_run(logger, folder / "logs" / "bound", told, outcome)


def _rows(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        for term in record.metrics["bound"]["terms"].values():
            yield {"method": record.name, **term}
