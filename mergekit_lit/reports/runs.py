"""This file reads a run folder back: its records, and the curves that training logged."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import read_json
from mergekit_lit.core.records import Record

Series: TypeAlias = list[tuple[int, float]]
"""Pairs of optimizer step and value."""


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        folder: the folder.
        records: its records, oldest first.
        curves: for each logged task, the series of each metric.
        cards: the card of each expert file that a record of training names, by the file's stem.
    """

    folder: Path
    records: tuple[Record, ...]
    curves: Mapping[str, Mapping[str, Series]]
    cards: Mapping[str, Card]

    def of_stage(self, *stages: str) -> list[Record]:
        """Return the records of these stages, oldest first."""
        return [record for record in self.records if record.stage in stages]


def read_run(folder: Path) -> Run:
    """Read every record and training log below a run folder.

    Raises:
        FileNotFoundError: no such folder, or no record in it.
        ValueError: a record, a log or an expert is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"A report needs a run folder, but there is none at {str(folder)!r}."
        )
    paths = sorted({*folder.rglob("*.record.json"), *folder.rglob("record.json")})
    records = [Record.read(path) for path in paths if _is_record(path)]
    if not records:
        raise FileNotFoundError(
            f"{str(folder)!r} must hold records (*.record.json), but has none. "
            "Make some first: mergekit-lit evaluate MODEL... --out FOLDER."
        )
    records.sort(key=lambda record: record.finished)
    return Run(folder, tuple(records), _read_curves(folder / "logs"), _read_cards(folder, records))


def read_metrics(path: Path) -> dict[str, Series]:
    """Read a `metrics.jsonl` or `metrics.csv` into one series a metric, by step.

    Raises:
        ValueError: the file is neither.
    """
    read = _json_lines if path.suffix == ".jsonl" else _csv_rows
    series: dict[str, Series] = {}
    try:
        for row in read(path):
            if row["step"] in (None, ""):  # a row that belongs to no step
                continue
            step = int(float(row["step"]))
            for name, value in row.items():
                number = _number(value)
                if name not in ("step", "epoch") and number is not None:
                    series.setdefault(name, []).append((step, number))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} must be a log of metrics with a step in each row, but is not: {error}."
        ) from None
    return series


def _read_curves(logs: Path) -> dict[str, dict[str, Series]]:
    curves = {}
    for folder in sorted(path for path in logs.glob("*") if path.is_dir()):
        found = [folder / name for name in ("metrics.jsonl", "metrics.csv")]
        present = [path for path in found if path.is_file()]
        if present:
            curves[folder.name] = read_metrics(present[0])
    return curves


def _read_cards(folder: Path, records: Iterable[Record]) -> dict[str, Card]:
    """Return the cards of the experts that are still there; a moved folder keeps them."""
    names = [
        Path(out).name for record in records if record.stage == "train" for out in record.outputs
    ]
    paths = [folder / name for name in names]
    return {path.stem: load_expert(path).card for path in paths if path.is_file()}


def _is_record(path: Path) -> bool:
    value = read_json(path)
    return isinstance(value, dict) and "stage" in value


def _json_lines(path: Path) -> Iterable[Mapping[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in lines if text.strip()]


def _csv_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _number(value: Any) -> float | None:
    """Return a finite number, or None for blanks, words, NaN and infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None
