"""This file is the choices of fine-tuning beside optimizer and schedule: what moves, and how."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.structure import Structure
from mergekit_lit.lit.lora import LowRank
from mergekit_lit.lit.tangent import Tangent
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.statistics import has_statistics

NormStatistics = Literal["train", "frozen"]
FinetuningName = Literal["full", "linearised", "lora"]


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What is trained, and on which loss.

    Attributes:
        kind: `full`, `linearised` or `lora`.
        norm_statistics: `train` or `frozen`.
        label_smoothing: share of the label's mass spread over all classes, in [0, 1).
        sam_radius: r of sharpness-aware minimisation, at least 0; 0 for none.
        lora_rank: rank of the factors of `lora`, at least 1.
        lora_alpha: positive; the product of the factors is scaled by lora_alpha / lora_rank.
        compiles: whether torch.compile runs the backbone.
    """

    kind: FinetuningName
    norm_statistics: NormStatistics
    label_smoothing: float
    sam_radius: float
    lora_rank: int
    lora_alpha: float
    compiles: bool

    def __post_init__(self) -> None:
        """Refuse values out of range, one line each."""
        for noun, value, known in (
            ("norm_statistics", self.norm_statistics, get_args(NormStatistics)),
            ("finetuning", self.kind, get_args(FinetuningName)),
        ):
            if value not in known:
                raise ValueError(unknown_name(noun, value, known))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must lie in [0, 1), but is {self.label_smoothing!r}."
            )
        if not 0 <= self.sam_radius < math.inf:
            raise ValueError(f"`sam_radius` must be at least 0, but is {self.sam_radius!r}.")
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, but is {self.lora_rank!r}.")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(
                f"`lora_alpha` must be positive and finite, but is {self.lora_alpha!r}."
            )
        if self.kind != "full" and self.compiles:
            raise ValueError(f"`compile` must be off with `finetuning` {self.kind!r}.")

    def check_fits(self, structure: Structure) -> None:
        """Refuse a backbone that cannot be trained so.

        Raises:
            ValueError: a tangent model whose base would depend on the batch.
        """
        batch_statistics = has_statistics(structure) and self.norm_statistics == "train"
        if self.kind == "linearised" and batch_statistics:
            raise ValueError(
                "`norm_statistics` must be 'frozen' with `finetuning` 'linearised', whose base "
                "must not depend on the batch, but is 'train'."
            )

    def tangent(self, start: Backbone, memory: torch.memory_format) -> Tangent | None:
        """Return the tangent model at the starting point, where that is what is trained."""
        return Tangent(start, memory=memory) if self.kind == "linearised" else None

    def adapter(self, start: Backbone, structure: Structure, *, seed: int) -> LowRank | None:
        """Return the low-rank factors, where these are what is trained; they do nothing yet."""
        if self.kind != "lora":
            return None
        params = dict(start.named_parameters())
        rank, alpha = self.lora_rank, self.lora_alpha
        return LowRank.of(params, structure, rank=rank, alpha=alpha, seed=seed)
