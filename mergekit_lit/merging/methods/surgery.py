"""This file is surgery: a small adapter for each task that undoes what merging did to features."""

from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.adapters import adapted
from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import generator
from mergekit_lit.merging.engine import merge
from mergekit_lit.merging.methods.moments import looks_together
from mergekit_lit.merging.methods.test_time import check_learning

# Most images of one task whose features are kept.
_IMAGES = 4096


def _check(_: Experts, *, rank: int, steps: int, lr: float, batch: int) -> None:
    check_learning(steps=steps, lr=lr, batch=batch)
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, but is {rank!r}.")


@MERGE_METHODS.add(
    form="whole",
    family="test-time",
    data="test-unlabelled",
    source="Yang et al. 2024, arXiv:2402.02705, eq. 4 (representation surgery)",
    order="the adapter of the t-th task is drawn from the t-th stream",
    adapters=True,
    check=_check,
)
# Each argument is one parameter of the method, hence so many.
def surgery(  # noqa: PLR0913
    experts: Experts,
    calibration: Calibration,
    *,
    merged_by: str = "task_arithmetic",
    settings: dict[str, Any] | None = None,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
) -> Merged:
    """Merge by another method, and learn per task what its features must be corrected by.

    z_t <- z - Up_t ReLU(Down_t z),  min E_x |z_t(x; merged) - z(x; theta_t)| by Adam

    Features of the merged model are those under the BatchNorm statistics of the merge's policy, or
    of large batches where they are to be recalibrated; those of expert t are under its own.

    Args:
        experts: T experts of one base.
        calibration: unlabelled test images of each task.
        merged_by: a method that needs no data and makes one model for all tasks.
        settings: values for its parameters; the others keep their defaults.
        rank: r, width of the adapters, >= 1.
        steps: number of steps, >= 0.
        lr: learning rate of Adam, > 0.
        batch: images in one step, >= 1.
        seed: of the adapters' first values and the batches.

    Source: Yang et al. 2024, arXiv:2402.02705, eq. 4 (representation surgery).
    Differs: the features, which the adapter does not change, are computed once; at most 4096
        images of a task are looked at.
    """
    _check(experts, rank=rank, steps=steps, lr=lr, batch=batch)
    merged = merge(experts, merged_by, config=settings, seed=seed)
    if merged.masks:
        raise ValueError(
            f"`merged_by` must make one model for all tasks, but {merged_by!r} gives each its own."
        )
    pairs = _features(experts, merged, calibration, seed)
    adapters = {
        task: fitted(
            *pairs[task],
            rank=rank,
            steps=steps,
            lr=lr,
            batch=batch,
            draw=generator(seed, "adapter", t),
        )
        for t, task in enumerate(experts.names)
    }
    facts = {"merged_by": {"method": merged_by, "config": merged.facts["config"]}}
    return Merged(shared=merged.shared, structure=experts.structure, adapters=adapters, facts=facts)


def fitted(
    features: Tensor,
    targets: Tensor,
    *,
    rank: int,
    steps: int,
    lr: float,
    batch: int,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Return the adapter, `down` (r, d) and `up` (d, r), that takes features to targets.

    min E |z - Up ReLU(Down z) - z'|, entry by entry, by Adam from Up = 0

    Args:
        features: z, (n, d).
        targets: z', (n, d).
        rank: r.
        steps: number of steps of Adam.
        lr: its learning rate.
        batch: rows in one step.
        draw: the stream of Down's first values, uniform in +-1/sqrt(d), and of the batches.
    """
    width = features.shape[1]
    uniform = torch.rand(rank, width, generator=draw, dtype=torch.float64)
    down = ((2 * uniform - 1) / width**0.5).to(features).requires_grad_()
    up = torch.zeros(width, rank).to(features).requires_grad_()
    adam = torch.optim.Adam([down, up], lr=lr)
    for _ in range(steps):
        rows = torch.randperm(len(features), generator=draw)[:batch].to(features.device)
        corrected = adapted({"down": down, "up": up}, features[rows])
        distance = (corrected - targets[rows]).abs().mean()
        down.grad, up.grad = torch.autograd.grad(distance, (down, up))
        adam.step()
    return {"down": down.detach().cpu(), "up": up.detach().cpu()}


@torch.no_grad()
def _features(
    experts: Experts, merged: Merged, calibration: Calibration, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the features of the merged model and of the expert by task, (n, d) each."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {task: [] for task in experts.names}
    own = dict(zip(experts.names, experts.tuned, strict=True))
    for batches in looks_together(calibration, experts.names, _IMAGES, seed):
        found = calibration.merged_features(merged.shared, batches)
        for task, batch in batches.items():
            target = calibration.expert.features(dict(own[task]), batch.inputs)
            parts[task].append((found[task], target))
    return {
        task: (torch.cat([z for z, _ in pairs]), torch.cat([z for _, z in pairs]))
        for task, pairs in parts.items()
    }
