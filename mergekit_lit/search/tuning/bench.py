"""This file is the bench of a search: candidates are merged, scored and logged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.recalibration import (
    ImagesBySplit,
    Veneers,
    declared_splits,
    recalibrate,
)
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.merging.engine import merge_many
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.search.tuning.objective import Answers, Objective
from mergekit_lit.search.tuning.race import Run, Stage, race
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.search.tuning.space import Config, key_of

# What the directions of one pass over the experts may take: a third of a small machine's memory.
_HELD_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What candidates are made of and scored with, loaded once for all of them.

    Attributes:
        experts: what is merged.
        backbone: a module of their architecture, on the device to compute on; never changed.
        scorer: the module that stands in for each candidate.
        objective: what is maximised.
        stages: the validation images, in growing subsets where candidates may be discarded.
        shown: images of each task by split, for methods that look at some.
        statistics: training images of each task that BatchNorm statistics are estimated on.
        veneers: what every merge gets beside its method.
        batch_norm: where the merged model's statistics come from.
        seed: of methods that draw at random, and of the images' order.
        confidence: level at which a candidate is discarded, in (0, 1).
    """

    experts: Experts
    backbone: Backbone
    scorer: Scorer
    objective: Objective
    stages: Sequence[Stage]
    shown: ImagesBySplit
    statistics: Mapping[str, Images]
    veneers: Veneers
    batch_norm: BatchNormPolicy
    seed: int
    confidence: float

    @property
    def count(self) -> int:
        """How many validation images there are, of all tasks."""
        return sum(len(places) for stage in self.stages for places in stage.values())

    def under(self, policy: BatchNormPolicy) -> "Bench":
        """Return the bench that makes candidates with statistics of another policy."""
        return replace(self, batch_norm=policy)

    def at_base(self) -> Merged:
        """Return the base as a candidate, with the statistics that candidates have: scale 0."""
        (merged,) = replace(self, veneers=()).merges("task_arithmetic", [{SCALE: 0.0}])
        if isinstance(merged, ValueError):
            raise merged
        return merged

    def merges(self, method: str, configs: Sequence[Config]) -> Iterator[Merged | ValueError]:
        """Yield the merge of each configuration, or why there is none; many in one pass."""
        make = partial(self._merged, method, self._calibrations(method))
        for part in self._passes(method, configs):
            count = 0
            try:
                for merged in make(part):
                    count += 1
                    yield merged
            except ValueError:
                # One of them is at fault, whichever came next.
                for config in part[count:]:
                    yield _one(make, config)

    def run(self, merged: Merged, rival: Run | None = None) -> Run:
        """Score a merge; against a rival only for as long as it may win."""

        def answer(stage: Stage) -> Answers:
            found = self.scorer.outcomes(merged, stage)
            return {task: self.objective.answers(outcomes) for task, outcomes in found.items()}

        return race(answer, self.stages, self.objective, rival=rival, confidence=self.confidence)

    def _merged(
        self, method: str, calibrations: Sequence[Calibration], configs: Sequence[Config]
    ) -> Iterator[Merged]:
        """Yield the merges of one pass, with their BatchNorm statistics."""
        later = self.batch_norm.startswith("recalibrate")
        per_task = self.batch_norm == "recalibrate-per-task"
        for merged in merge_many(
            self.experts,
            method,
            configs,
            veneers=self.veneers,
            batch_norm="base" if later else self.batch_norm,
            seed=self.seed,
            calibration=calibrations,
        ):
            yield (
                recalibrate(
                    merged,
                    self.statistics,
                    backbone=self.backbone,
                    per_task=per_task,
                    seed=self.seed,
                )
                if later
                else merged
            )

    def _passes(self, method: str, configs: Sequence[Config]) -> Iterator[list[Config]]:
        """Cut configurations into passes that hold no more directions than fit into memory."""
        size = sum(tensor.numel() * 4 for tensor in self.experts.base.values())
        most = max(1, _HELD_BYTES // size)
        shared = bool(MERGE_METHODS.get(method).facts.get("homogeneous"))
        part: list[Config] = []
        directions: set[str] = set()
        for config in configs:
            rest = {name: value for name, value in config.items() if name != SCALE or not shared}
            if part and len(directions | {key_of(rest)}) > most:
                yield part
                part, directions = [], set()
            part.append(config)
            directions.add(key_of(rest))
        yield part

    def _calibrations(self, method: str) -> list[Calibration]:
        """Return the images that a method and the veneers look at themselves, by split."""
        return [
            calibration_on(
                self.shown[split],
                self.experts,
                backbone=self.backbone,
                split=split,
                batch_norm=self.batch_norm,
            )
            for split in declared_splits(method, self.veneers)
        ]


def _one(
    make: Callable[[Sequence[Config]], Iterator[Merged]], config: Config
) -> Merged | ValueError:
    try:
        return next(make([config]))
    except ValueError as error:
        return error
