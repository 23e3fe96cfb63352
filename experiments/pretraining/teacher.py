"""This file is the optional teacher of pretraining: what another base sees in the same views."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mergekit_lit.models.backbones import Backbone, load_base


@dataclass(frozen=True)
class Teacher:
    """A trained backbone with the mean and deviation of each of its features, (d,)."""

    backbone: Backbone
    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return standardised features (B, d) of normalised views (B, 3, S, S)."""
        features: Tensor = self.backbone(x)
        return (features - self.mean) / self.deviation


@torch.no_grad()
def make_teacher(spec: str, views: Iterable[Tensor]) -> Teacher:
    """Load a base and find the mean and deviation of its features over normalised views."""
    backbone = load_base(spec)[0].eval()
    features = torch.cat([backbone(x) for x in views])
    # A feature that is hardly ever active says little, and may not be blown up.
    return Teacher(backbone, features.mean(dim=0), features.std(dim=0).clamp_min(1e-3))


def distillation(guess: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between the student's guess and the teacher's features."""
    return (1 - cosine_similarity(guess, target, dim=1)).mean()
