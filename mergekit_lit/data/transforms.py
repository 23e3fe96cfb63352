"""This file turns uint8 images into a backbone's input, and augments batches reproducibly."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mergekit_lit.core.registry import unknown_name

AUGMENTATIONS = ("none", "flip", "crop", "crop-flip")


def to_input(
    x: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return images as a backbone takes them.

    input = (x / 255 - mean) / std, resized to size x size before (bilinear, antialiased) where the
    size differs.

    Args:
        x: uint8 (B, H, W, 3), on any device.
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, positive.
        size: height and width of the input, in pixels.
        dtype: of the result; computed in float32.

    Returns:
        (B, 3, size, size).

    Raises:
        ValueError: `x` is not uint8 (B, H, W, 3).
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(
            f"`x` must be uint8 (B, H, W, 3), but is {x.dtype} {tuple(x.shape)}. "
            "Images are normalised here, not before."
        )
    scale = torch.tensor([1 / (255 * s) for s in std], device=x.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=x.device)
    out = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if out.shape[-2:] != (size, size):
        out = interpolate(out, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return torch.addcmul(shift.view(3, 1, 1), out, scale).to(dtype)


def augment(x: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return a batch with seeded random changes, each image its own; the input stays as it is.

    Args:
        x: (B, H, W, 3) images.
        name: `none`; `flip`, left to right with probability one half; `crop`, shifted by up to an
            eighth of the side with black borders; `crop-flip`, both.
        generator: CPU generator; the same state gives the same batch.

    Raises:
        KeyError: no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise KeyError(unknown_name("augmentation", name, AUGMENTATIONS))
    if "crop" in name:
        x = _shifted(x, generator)
    if "flip" in name:
        flipped = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(2), x)
    return x


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image shifted by a random offset within an eighth of the side."""
    count, height, width, _ = x.shape
    reach = max(1, min(height, width) // 8)
    padded = torch.nn.functional.pad(x, (0, 0, reach, reach, reach, reach))
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height)).to(x.device)
    columns = (offsets[1] + torch.arange(width)).to(x.device)
    image = torch.arange(count, device=x.device).view(-1, 1, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]]
