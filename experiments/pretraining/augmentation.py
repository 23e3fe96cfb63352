"""This file is the augmentation of pretraining: random views of a batch of small images."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate


def random_views(x: Tensor, plain: Tensor, draw: torch.Generator) -> Tensor:
    """Return randomly moved, recoloured, blurred and erased views of images.

    Args:
        x: images in [0, 1], (B, 3, S, S).
        plain: which of them are grey drawings or scripts, (B,) bool: these are never mirrored, and
            half of them get two random colours for ink and paper.
        draw: source of all randomness.
    """
    x = _moved(x, plain, draw)
    x = _two_coloured(x, plain, draw)
    x = _recoloured(x, draw)
    x = _blurred(x, draw)
    x = (x + 0.06 * _uniform(len(x), 0.0, 1.0, draw) ** 2 * _noise(x, draw)).clamp(0, 1)
    return _erased(x, draw)


def _moved(x: Tensor, plain: Tensor, draw: torch.Generator) -> Tensor:
    """Rotate by up to 15 degrees, zoom by 0.75 to 1.25, shift by up to 12 %, mirror half."""
    count = len(x)
    angle = torch.empty(count).uniform_(-math.pi / 12, math.pi / 12, generator=draw)
    zoom = torch.empty(count, 2).uniform_(-0.29, 0.29, generator=draw).exp()
    shift = torch.empty(count, 2).uniform_(-0.24, 0.24, generator=draw)
    mirrored = (torch.rand(count, generator=draw) < 0.5) & ~plain
    zoom[:, 0] = torch.where(mirrored, -zoom[:, 0], zoom[:, 0])
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * zoom[:, 0], -sin * zoom[:, 1], shift[:, 0]]
    rows += [sin * zoom[:, 0], cos * zoom[:, 1], shift[:, 1]]
    matrix = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _two_coloured(x: Tensor, plain: Tensor, draw: torch.Generator) -> Tensor:
    """Paint half of the grey images in one random colour on another."""
    ink, paper = torch.rand(2, len(x), 3, 1, 1, generator=draw)
    chosen = plain & (torch.rand(len(x), generator=draw) < 0.5)
    return torch.where(chosen.view(-1, 1, 1, 1), paper + x * (ink - paper), x)


def _recoloured(x: Tensor, draw: torch.Generator) -> Tensor:
    """Scale contrast and brightness per channel, turn a fifth grey, invert a quarter."""
    count = len(x)
    gain = torch.empty(count, 3, 1, 1).uniform_(0.7, 1.2, generator=draw)
    gain = gain * _uniform(count, 0.6, 1.2, draw)
    shift = torch.empty(count, 3, 1, 1).uniform_(-0.1, 0.1, generator=draw)
    x = (0.5 + (x - 0.5) * gain + shift + _uniform(count, -0.1, 0.1, draw)).clamp(0, 1)
    grey = _chosen(count, 0.2, draw)
    x = torch.where(grey, x.mean(dim=1, keepdim=True), x)
    return torch.where(_chosen(count, 0.25, draw), 1 - x, x)


def _blurred(x: Tensor, draw: torch.Generator) -> Tensor:
    """Halve the resolution of a fifth of the images, as scans of few pixels look."""
    small = interpolate(x, scale_factor=0.5, mode="area")
    coarse = interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(_chosen(len(x), 0.2, draw), coarse, x)


def _erased(x: Tensor, draw: torch.Generator) -> Tensor:
    """Grey out a rectangle of 4 to 12 pixels a side in a quarter of the images."""
    count, size = len(x), x.shape[-1]
    sides = torch.randint(size // 8, 3 * size // 8 + 1, (count, 2), generator=draw)
    corner = (torch.rand(count, 2, generator=draw) * (size - sides)).long()
    steps = torch.arange(size)
    inside = (steps >= corner.unsqueeze(2)) & (steps < (corner + sides).unsqueeze(2))  # (B, 2, S)
    box = inside[:, 0, :, None] & inside[:, 1, None, :]
    return x.masked_fill(_chosen(count, 0.25, draw) & box.unsqueeze(1), 0.5)


def _noise(x: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=draw)


def _uniform(count: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    """Return one number per image, (B, 1, 1, 1)."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=draw)


def _chosen(count: int, share: float, draw: torch.Generator) -> Tensor:
    """Return which images are chosen, (B, 1, 1, 1)."""
    return torch.rand(count, 1, 1, 1, generator=draw) < share
