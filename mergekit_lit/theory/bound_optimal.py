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
from mergekit_lit.theory.constants import columns_of, measure_point, task_gradients
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import ALL, effective_travel
from mergekit_lit.theory.heterogeneity import mean_slopes
from mergekit_lit.theory.objective import Objective
from mergekit_lit.theory.optimal import Landscape, Vector, optimum
from mergekit_lit.theory.optimal_layers import Layers, best_rows
from mergekit_lit.theory.optimal_steps import Steps, best_steps
from mergekit_lit.theory.smoothness import measure_sample_gradients, measure_secant


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
def bound_optimal(  # noqa: PLR0913
    experts: Experts,
    calibration: Calibration,
    *,
    by: Literal["step", "path"] = "step",
    granularity: Literal["task", "layer"] = "task",
    travel: float | None = 1.0,
    micro_batches: int = 4,
    batch: int = 8,
    images: int = 32,
    seed: int = 0,
) -> Tensor | dict[str, Tensor]:
    """Weigh the deltas so that the computable part of the excess-error bound is least.

    lambda = argmin_{lambda >= 0} <grad F_S(x0), step> + (L / 2) ||step||^2 + generalization,
    step = sum_t lambda_t tau_t, at a fixed travel A_eff = sum_t lambda_t s_t; or, by the path,
    surrogate loss at the base + drift + merged noise + divergence + generalization

    Travel, path and noise come from the cards; losses, gradients and smoothness are measured on
    training images, at the base and at the plain average. Stability is the path estimate of the
    cards, which no twins have calibrated.

    Args:
        experts: T experts of one base, whose cards tell travel, path and noise.
        calibration: labelled training images of each task.
        by: what bounds the merge's training loss: the `step` that the deltas make, or the `path`
            of the trainings, which is looser and gives most to the experts that drifted least.
        granularity: one coefficient for each `task`, or for each task and `layer` group.
        travel: A_eff as a multiple of the plain average's, > 0; null searches it from 0 to twice
            the average's, and returns zeros where no step is better than the base.
        micro_batches: of each task, for the gradients at the base, at least 2.
        batch: largest number of images in one, at least 1; fewer where a task has fewer.
        images: of each task, for the smoothness and the gradients of samples, at least 1.
        seed: of the choice of images.

    Returns:
        Coefficients lambda, (T,); by tensor where they differ by layer.

    Source: our reconstruction of the bound of arXiv 2601.21690; travels after Wang et al. 2020,
    arXiv:2007.07481 (FedNova).
    Differs: see `theory.optimal_steps.best_steps`, `theory.optimal.optimum` and
    `theory.optimal_layers.best_rows`.
    """
    _check(experts, travel=travel, micro_batches=micro_batches, batch=batch, images=images)
    asked = Effort(micro_batches=micro_batches, batch=batch, hessian_images=images, seed=seed)
    effort = asked.within(min(len(calibration.samples[task]) for task in experts.names))
    problem = _Problem(experts, calibration, effort)
    average = float(problem.travels.mean())
    far, most = None if travel is None else travel * average, 2.0 * average
    groups = layer_groups(experts)
    if by == "step":
        if granularity == "task":
            groups = {ALL: experts.merged_names()}
        rows = best_steps(problem.steps(groups), travel=far, most=most)
    else:
        landscape, gram = problem.landscape(groups)
        if granularity == "task":
            return torch.from_numpy(optimum(landscape, travel=far, most=most).coefficients)
        layers = Layers(whole=landscape, moved=problem.moved(groups), gram=gram)
        rows = best_rows(layers, travel=far, most=most)
    found = torch.from_numpy(rows)
    if granularity == "task":
        return found[0]
    return {name: row for names, row in zip(groups.values(), found, strict=True) for name in names}


class _Problem:
    """Experts, images and losses, from which what is minimised is measured."""

    def __init__(self, experts: Experts, calibration: Calibration, effort: Effort) -> None:
        names = experts.merged_names()
        base = {name: tensor.float() for name, tensor in floats(experts.base).items()}
        fixed = {**base, **calibration.statistics}
        self.experts, self.calibration, self.effort = experts, calibration, effort
        self.objectives = [Objective(task, calibration, fixed) for task in experts.names]
        self.start = {name: base[name] for name in names}
        self.average = {
            name: self.start[name] + experts.deltas(name).mean(0).float() for name in names
        }
        self.p = np.full(len(experts), 1.0 / len(experts))
        self.travels = np.array([_known(experts, t) for t in range(len(experts))])

    def moved(self, groups: Mapping[str, Sequence[str]]) -> Vector:
        """Return the parts of each expert's squared displacement, (B, T)."""
        return np.array(list(moved_parts(self.experts, groups).values()))

    def steps(self, groups: Mapping[str, Sequence[str]]) -> Steps:
        """Return what bounds the loss after a step, by block."""
        smoothness, sample_gradient2 = self._curved()
        gradients = task_gradients(
            self.objectives, self.start, self.calibration, effort=self.effort
        )
        count = len(self.experts)
        slopes = np.zeros((len(groups), count))
        products = np.zeros((len(groups), count, count))
        for block, names in enumerate(groups.values()):
            # Tensor by tensor: the doubles of all deltas would not always fit.
            for name in names:
                deltas = self.experts.deltas(name).reshape(count, -1).double()
                columns = columns_of(self.start, [name])
                found = mean_slopes(gradients, self.p.tolist(), deltas, columns)
                slopes[block] += [estimate.value for estimate in found]
                products[block] += (deltas @ deltas.T).numpy()
        return Steps(
            p=self.p,
            travel=self.travels,
            moved=self.moved(groups),
            slopes=slopes,
            products=products,
            eps2=_of_cards(self.experts, "eps_path") ** 2,
            smoothness=smoothness,
            sample_gradient2=sample_gradient2,
        )

    def landscape(self, groups: Mapping[str, Sequence[str]]) -> tuple[Landscape, Vector]:
        """Return what bounds the loss by the path, and products of gradients by layer group."""
        smoothness, sample_gradient2 = self._curved()
        at_base = measure_point(
            self.objectives,
            self.start,
            self.calibration,
            p=self.p.tolist(),
            effort=self.effort,
            blocks=groups,
        )
        landscape = Landscape(
            p=self.p,
            travel=self.travels,
            start=np.array([at_base.losses[task] for task in self.experts.names]),
            d2=_of_cards(self.experts, "mean_squared_displacement"),
            noise=_noise(self.experts),
            eps2=_of_cards(self.experts, "eps_path") ** 2,
            smoothness=smoothness,
            # A negative estimate means that the gradient is lost in the noise.
            gradient2=max(0.0, at_base.gradient2.value),
            sample_gradient2=sample_gradient2,
        )
        return landscape, np.array([at_base.gram[group] for group in groups])

    def _curved(self) -> tuple[float, float]:
        """Return L and G^2, measured at the base and at the plain average."""
        p, effort = self.p.tolist(), self.effort
        smooth = measure_secant(
            self.objectives, self.start, self.average, self.experts, self.calibration, effort=effort
        )
        each = measure_sample_gradients(
            self.objectives, self.average, self.calibration, p=p, effort=effort
        )
        if not math.isfinite(smooth + each.value):
            raise ValueError(
                "The gradients at the experts and their average must be finite, but L is "
                f"{smooth} and G^2 is {each.value}. Leave out the expert that diverged."
            )
        return smooth, each.value


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
