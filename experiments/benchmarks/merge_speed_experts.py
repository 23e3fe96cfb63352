"""This file makes the experts that merging is measured on: timm's models with made-up deltas."""

from pathlib import Path

import torch
from torch import Tensor


def write_experts(folder: Path, model: str, count: int) -> list[str]:
    """Write base and experts, those that are not there yet; return their files, the base first."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{model}-{name}.safetensors" for name in ("base", *range(count))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = timm.create_model(model, num_classes=0).state_dict()
    for seed, file in enumerate(files):
        if not file.is_file():
            draw = torch.Generator().manual_seed(seed)
            save_file({n: moved(t, draw) if seed else t for n, t in base.items()}, file)
    return [str(file) for file in files]


def moved(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Return a tensor with a delta of a falling spectrum, as fine-tuning leaves it."""
    if not tensor.is_floating_point():
        return tensor.clone()
    noise = torch.randn(tensor.shape, generator=draw)
    if tensor.ndim > 1:
        rows, columns = tensor.flatten(1).shape
        rank = min(rows, columns, 64)
        left = torch.randn(rows, rank, generator=draw) * torch.arange(1, rank + 1) ** -0.5
        spikes = left @ torch.randn(rank, columns, generator=draw)
        noise = noise + 0.5 * spikes.reshape(tensor.shape)
    # Variances of BatchNorm, which are vectors, must not fall below 0.
    return (tensor + 3e-4 * noise).abs() if tensor.ndim == 1 else tensor + 3e-4 * noise
