"""This file is bound-aware merging: the method whose coefficients make the bound least."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.theory.blocks import layer_groups, moved_parts
from mergekit_lit.theory.constants import (
    Effort,
    measure_point,
    measure_sample_gradients,
    measure_secant,
)
from mergekit_lit.theory.facts import effective_travel
from mergekit_lit.theory.objective import Objective
from mergekit_lit.theory.optimal import Landscape, Vector, optimum
from mergekit_lit.theory.optimal_layers import Layers, best_rows


def _check(
    experts: Experts, *, travel: float | None, micro_batches: int, batch: int, images: int
) -> None:
    if travel is not None and not 0 < travel < float("inf"):
        raise ValueError(f"`travel` must be positive and finite, or null, but is {travel!r}.")
    Effort(micro_batches=micro_batches, batch=batch, hessian_images=images)
    for t in range(len(experts)):
        _known(experts, t)


@MERGE_METHODS.add(
    form="linear",
    family="bound",
    data="train",
    source="Our reconstruction of the bound of arXiv 2601.21690",
    search={"travel": (0.1, 2.0)},
    order="sums over experts are rounded in their order",
    check=_check,
)
def bound_optimal(
    experts: Experts,
    calibration: Calibration,
    *,
    granularity: Literal["task", "layer"] = "task",
    travel: float | None = 1.0,
    micro_batches: int = 4,
    batch: int = 8,
    images: int = 32,
    seed: int = 0,
) -> Tensor | dict[str, Tensor]:
    """Weigh the deltas so that the computable part of the excess-error bound is least.

    lambda = argmin_{lambda >= 0} surrogate loss at the base + drift + merged noise
    + divergence + generalization, at a fixed travel A_eff = sum_t lambda_t s_t

    Travel, path and noise come from the cards; losses, gradients and smoothness are measured on
    training images, at the base and at the plain average. Stability is the path estimate of the
    cards, which no twins have calibrated.

    Args:
        experts: T experts of one base, whose cards tell travel, path and noise.
        calibration: labelled training images of each task.
        granularity: one coefficient for each `task`, or for each task and `layer` group.
        travel: A_eff as a multiple of the plain average's, > 0; null searches it from 0 to twice
            the average's, and returns zeros where no step is better than the base.
        micro_batches: of each task, for the gradient's norm, at least 2.
        batch: largest number of images in one, at least 1; fewer where a task has fewer.
        images: of each task, for the smoothness and the gradients of samples, at least 1.
        seed: of the choice of images.

    Returns:
        Coefficients lambda, (T,); by tensor where they differ by layer.

    Source: our reconstruction of the bound of arXiv 2601.21690; travels after Wang et al. 2020,
    arXiv:2007.07481 (FedNova).
    Differs: see `theory.optimal.optimum` and `theory.optimal_layers.best_rows`.
    """
    _check(experts, travel=travel, micro_batches=micro_batches, batch=batch, images=images)
    asked = Effort(micro_batches=micro_batches, batch=batch, hessian_images=images, seed=seed)
    fewest = min(len(calibration.samples[task]) for task in experts.names)
    effort = asked.within(fewest)
    travels = np.array([_known(experts, t) for t in range(len(experts))])
    average = float(travels.mean())
    chosen = None if travel is None else travel * average
    groups = layer_groups(experts)
    landscape, gram = _landscape(experts, calibration, travels, effort, groups)
    if granularity == "task":
        found = optimum(landscape, travel=chosen, most=2.0 * average)
        return torch.from_numpy(found.coefficients)
    moved = np.array(list(moved_parts(experts, groups).values()))
    layers = Layers(whole=landscape, moved=moved, gram=gram)
    rows = torch.from_numpy(best_rows(layers, travel=chosen, most=2.0 * average))
    return {name: row for names, row in zip(groups.values(), rows, strict=True) for name in names}


def _landscape(
    experts: Experts,
    calibration: Calibration,
    travels: Vector,
    effort: Effort,
    groups: Mapping[str, Sequence[str]],
) -> tuple[Landscape, Vector]:
    """Return what the bound is made of, and the products of the gradients by layer group.

    They are measured at the base and at the plain average.
    """
    names = experts.merged_names()
    base = {name: tensor.float() for name, tensor in floats(experts.base).items()}
    fixed = {**base, **calibration.statistics}
    objectives = [Objective(task, calibration, fixed) for task in experts.names]
    start = {name: base[name] for name in names}
    average = {name: start[name] + experts.deltas(name).mean(0).float() for name in names}
    p = np.full(len(experts), 1.0 / len(experts))
    shares = p.tolist()
    at_base = measure_point(objectives, start, calibration, p=shares, effort=effort, blocks=groups)
    smooth = measure_secant(objectives, start, average, experts, calibration, effort=effort)
    each = measure_sample_gradients(objectives, average, calibration, p=shares, effort=effort)
    if not math.isfinite(smooth + each.value):
        raise ValueError(
            f"The gradients at the experts and their average must be finite, but L is {smooth} and "
            f"G^2 is {each.value}. Leave out the expert that diverged."
        )
    landscape = Landscape(
        p=p,
        travel=travels,
        start=np.array([at_base.losses[task] for task in experts.names]),
        d2=_of_cards(experts, "mean_squared_displacement"),
        noise=_noise(experts),
        eps2=_of_cards(experts, "eps_path") ** 2,
        smoothness=smooth,
        # A negative estimate means that the gradient is lost in the noise.
        gradient2=max(0.0, at_base.gradient2.value),
        sample_gradient2=each.value,
    )
    return landscape, np.array([at_base.gram[group] for group in groups])


def _known(experts: Experts, t: int) -> float:
    """Return the travel of expert t, or what stands in for it."""
    found = effective_travel(experts.cards[t])
    if found is None or not 0 < found < float("inf"):
        raise ValueError(
            "`bound_optimal` needs the travel eta ||a||_1 of every expert, positive, but the card "
            f"of {experts.names[t]!r} says {found!r}. Train it here, or merge by another method."
        )
    return found


def _of_cards(experts: Experts, name: str) -> Vector:
    """Return one fact of every card; 0 where it is unknown: its term is then left out."""
    return np.array([float(getattr(card, name) or 0.0) for card in experts.cards])


def _noise(experts: Experts) -> Vector:
    """Return sum_k (eta_k a_k)^2 sigma^2 / b of every expert; 0 where it is unknown."""
    known = [
        (card.travel_squared or 0.0) * (card.gradient_noise or 0.0) / (card.batch or 1)
        for card in experts.cards
    ]
    return np.array(known)
