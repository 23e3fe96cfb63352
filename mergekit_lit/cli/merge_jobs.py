"""This file is `merge` and `evaluate` as a sweep repeats them."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from mergekit_lit.cli.dotted import nested, refuse_idle, typed
from mergekit_lit.cli.evaluate import evaluate_parser, evaluated
from mergekit_lit.cli.merge import merge_parser, merged_files
from mergekit_lit.cli.method_flags import recipe_of
from mergekit_lit.cli.parsing import instantiated, parse_mapping
from mergekit_lit.cli.saving import write_config
from mergekit_lit.cli.swept import SweptCommand, put_damaged_aside
from mergekit_lit.core.records import Record
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.reports.results import result_rows
from mergekit_lit.search.sweeping.jobs import Config
from mergekit_lit.stages.evaluate import evaluate_files

ScoreSplit = Literal["none", "val", "test"]

# Where results go and how they are told changes none.
_IDLE = frozenset({"data.download", "data.root", "dry_run", "json", "logger", "name", "out"})
_METRICS = ("accuracy", "normalised_accuracy", "loss")
_MERGED, _SCORES = "merged", "scores"
# What tells the images of scores, as it tells those that methods look at.
_IMAGES = ("n", "train_share", "val_share", "reserve", "split_seed", "size", "root", "download")


@dataclass(frozen=True)
class MergeJob(SweptCommand):
    """Merges, and scores the result if asked.

    Attributes:
        score: images of `data.suite` that each merged model is scored on.
    """

    stage = "merge"
    idle = _IDLE

    score: ScoreSplit = "none"

    @property
    def metrics(self) -> Sequence[str]:
        """Scores, if there are any."""
        return () if self.score == "none" else _METRICS

    def kind(self, point: Mapping[str, Any]) -> Hashable:
        """Return the method, each with parameters of its own."""
        return self._method(point)

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default."""
        refuse_idle(point, self.idle)
        parser, _ = _merge_parser(self._method(point))
        config = typed(parser, self.given, {**point, "out": f"{_MERGED}.safetensors"})
        if self.score != "none" and config["data.suite"] is None:
            raise ValueError(
                "`data.suite` must name the suite on which merged models are scored, but does not."
            )
        return config

    def _method(self, point: Mapping[str, Any]) -> str:
        return str(point.get("method", self.given.get("method", "average")))

    def is_done(self, folder: Path, steps: Sequence[int]) -> bool:  # noqa: ARG002 (none here)
        """Return whether there are the records of the merge and, if asked for, of its scores."""
        return _has_record(folder, _MERGED) and (
            self.score == "none" or _has_record(folder, f"{_SCORES}-{self.score}")
        )

    def execute(self, config: Config, folder: Path, steps: Sequence[int]) -> None:  # noqa: ARG002
        """Merge, and score, unless that is done."""
        put_damaged_aside(folder)
        out = folder / f"{_MERGED}.safetensors"
        values = {**config, "out": str(out)}
        if not _has_record(folder, _MERGED):
            parser, flags = _merge_parser(config["method"])
            made = instantiated(parser, parse_mapping(parser, nested(values)))
            _save(values, folder)
            merged_files(made, recipe_of(made, flags))
        if self.score != "none":
            images = {key: config[f"data.{key}"] for key in _IMAGES}
            root = Path(images["root"]) if images.pop("root") else None
            data = MergeDataModule(config["data.suite"], split=self.score, root=root, **images)
            evaluate_files(
                [out],
                data=data,
                out=folder,
                name=f"{_SCORES}-{self.score}",
                logger=config["logger"],
            )

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """Return the scores by task, and their means; or the file alone if there are none."""
        file = f"{_MERGED}.safetensors"
        record = folder / f"{_SCORES}-{self.score}.record.json"
        scores = result_rows(Record.read(record)) if record.is_file() else []
        return [_told(row) | {"file": file} for row in scores] or [{"file": file}]

    def cost_kind(self, config: Config) -> Hashable:
        """Return the method."""
        return str(config["method"])


@dataclass(frozen=True)
class EvaluateJob(SweptCommand):
    """Scores models."""

    stage = "evaluate"
    idle = _IDLE

    @property
    def metrics(self) -> Sequence[str]:
        """Scores."""
        return _METRICS

    def complete(self, point: Mapping[str, Any]) -> Config:
        """Return the file's configuration with a point set, typed, and with every default."""
        refuse_idle(point, self.idle)
        return typed(_evaluate_parser(), self.given, point)

    def is_done(self, folder: Path, steps: Sequence[int]) -> bool:  # noqa: ARG002 (none here)
        """Return whether there is the record."""
        return _has_record(folder, _SCORES)

    def execute(self, config: Config, folder: Path, steps: Sequence[int]) -> None:  # noqa: ARG002
        """Evaluate."""
        put_damaged_aside(folder)
        values = {**config, "out": str(folder), "name": _SCORES}
        parser = _evaluate_parser()
        made = vars(instantiated(parser, parse_mapping(parser, nested(values))))
        made.pop("json")
        _save(values, folder)
        evaluated(made)

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """Return the scores of each model by task, and their means."""
        record = Record.read(folder / f"{_SCORES}.record.json")
        return [_told(row) | {"file": f"{_SCORES}.csv"} for row in result_rows(record)]

    def cost_kind(self, config: Config) -> Hashable:
        """Return None: all runs count alike."""


def _has_record(folder: Path, stem: str) -> bool:
    return Record.find(folder / f"{stem}.record.json") is not None


def _save(values: Config, folder: Path) -> None:
    """Save the configuration, so that the run can be made again by itself."""
    write_config({".yaml": yaml.safe_dump(nested(values), sort_keys=False)}, folder / "config")


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table of results tells of a score."""
    names = ("model", "task", "split", "n", *_METRICS)
    return {name: row[name] for name in names}


@lru_cache(maxsize=64)
def _merge_parser(method: str) -> tuple[ArgumentParser, list[str]]:
    return merge_parser(method)


@lru_cache(maxsize=1)
def _evaluate_parser() -> ArgumentParser:
    return evaluate_parser()
