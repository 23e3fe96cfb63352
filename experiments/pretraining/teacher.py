"""This file is the optional teacher of pretraining: features of an ImageNet network."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from mergekit_lit.models.backbones import load_base


@torch.no_grad()
def teacher_targets(x: Tensor, *, directions: int = 192, size: int = 96) -> Tensor:
    """Return what EfficientNet-Lite0 sees in each image, whitened, (N, directions).

    Args:
        x: uint8 (N, S, S, 3).
        directions: principal directions kept, the strongest first.
        size: height and width that images are enlarged to, in pixels.
    """
    teacher = load_base("efficientnet_lite0", image_size=size)[0].eval()
    features = []
    for part in x.split(100):
        pixels = (part.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        pixels = interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        features.append(teacher(pixels.clamp(-1, 1)))
    f = torch.cat(features).double()
    f = f - f.mean(dim=0)
    variance, axes = torch.linalg.eigh(f.T @ f / len(f))
    kept = axes[:, -directions:]
    # The square root of whitening: every direction counts, strong ones still more.
    return ((f @ kept) / variance[-directions:].clamp_min(1e-12) ** 0.25).float()


def distillation(guess: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between the student's guess and the teacher's features."""
    return (1 - cosine_similarity(guess, target, dim=1)).mean()
