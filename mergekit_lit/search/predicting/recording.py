"""This file writes a prediction down: its record, and the page beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.search.predicting.columns import Level
from mergekit_lit.search.predicting.intervals import LEVEL
from mergekit_lit.stages.advice import expert_cautions
from mergekit_lit.stages.folders import check_folder, check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.report import build_report


def record_path(out: Path | None) -> Path | None:
    """Return where the record of a prediction goes: a folder's own, or the file that is named."""
    if out is None:
        return None
    path = out if out.suffix == ".json" else out / "predict.record.json"
    if path != out:
        check_folder(out)
    check_record(path, "predict")
    return path


def images_at(level: Level, calibration: Calibration | None) -> Calibration | None:
    """Return where the images that a level looks at come from; None where it looks at none.

    Raises:
        ValueError: it looks at some, and no suite is named.
    """
    if level == "cards":
        return None
    if calibration is None:
        raise ValueError(
            f"`level` {level!r} must be told a suite to take images from, but got none. Name it by "
            "`--data.suite`, or predict from cards and weights alone: `--level cards`."
        )
    return calibration


def recorded(
    watch: Stopwatch,
    out: Path | None,
    experts: Sequence[Path],
    calibration: Calibration | None,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    title: str,
) -> Record:
    """Return the record of a prediction, written where `out` says, in a folder with a page.

    Args:
        watch: what was started before the work.
        out: as `record_path` takes it.
        experts: files of what was predicted from.
        calibration: where images came from, or would have.
        config: what else was asked for.
        metrics: what was predicted.
        title: of the page.
    """
    path = record_path(out)
    record = watch.finish(
        Record(
            stage="predict",
            name=path.stem.removesuffix(".record") if path else "predict",
            config={
                "experts": list(map(str, experts)),
                **config,
                "calibration": asdict(calibration) if calibration else None,
            },
            metrics={**metrics, "coverage": LEVEL, "warnings": expert_cautions(experts)},
        )
    )
    if path is not None:
        record.write(path)
        if path != out:
            build_report(path.parent, title=title)
    return record
