"""Observers of training and merging. Name one by its class path to add it to a run."""

from mergekit_lit.callbacks.base_score import BaseScore
from mergekit_lit.callbacks.bound_terms import BoundTerms
from mergekit_lit.callbacks.delta_geometry import DeltaGeometry
from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.callbacks.gradient_noise import GradientNoise
from mergekit_lit.callbacks.gradient_norm import GradientNorm
from mergekit_lit.callbacks.last_checkpoint import LastCheckpoint
from mergekit_lit.callbacks.merge_callback import MergeCallback
from mergekit_lit.callbacks.path_length import PathLength
from mergekit_lit.callbacks.progress import Progress
from mergekit_lit.callbacks.stability_twins import StabilityTwins

__all__ = [
    "BaseScore",
    "BoundTerms",
    "DeltaGeometry",
    "ExpertExport",
    "GradientNoise",
    "GradientNorm",
    "LastCheckpoint",
    "MergeCallback",
    "PathLength",
    "Progress",
    "StabilityTwins",
]
