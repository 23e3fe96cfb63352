"""This file is merging at test time: coefficients that make the model sure of unlabelled images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.merging.configuration import check_interval
from mergekit_lit.merging.methods.sparsify import agreeing, trim_and_elect
from mergekit_lit.merging.steps import moved, weighted_sum


def check_learning(*, steps: int, lr: float, batch: int) -> None:
    """Refuse settings of Adam that cannot be.

    Raises:
        ValueError: a value out of range.
    """
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, but is {steps!r}.")
    if lr <= 0:
        raise ValueError(f"`lr` must be above 0, but is {lr!r}.")
    if batch < 1:
        raise ValueError(f"`batch` must be at least 1, but is {batch!r}.")


def _check(_: Experts, *, start: float, density: float, steps: int, lr: float, batch: int) -> None:
    check_interval("start", start, "[0, 1]")
    check_interval("density", density, "(0, 1]")
    check_learning(steps=steps, lr=lr, batch=batch)


@MERGE_METHODS.add(
    form="whole",
    family="test-time",
    data="test-unlabelled",
    source="Yang et al. 2024, arXiv:2310.02575, eq. 4 (AdaMerging)",
    order="the batches of the t-th task are drawn from the t-th stream",
    check=_check,
)
# Each argument is one parameter of the method, hence so many.
def adamerging(  # noqa: PLR0913
    experts: Experts,
    calibration: Calibration,
    *,
    granularity: Literal["task", "layer"] = "layer",
    plus_plus: bool = False,
    density: float = 0.2,
    start: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
) -> Merged:
    """Learn the coefficients of the deltas by making the merged model's answers sure.

    theta^l(lambda) = theta_0^l + sum_t lambda_t^l tau_t^l,
    min_lambda sum_t E_x H(softmax f_t(x; theta(lambda))) by Adam, lambda in [0, 1]

    dL/dlambda_t^l = <dL/dtheta^l, tau_t^l>: one backward pass of the merged model and T products of
    each tensor, whatever T. The model is looked at under the BatchNorm statistics of the merge's
    policy, or of each batch where they are to be recalibrated.

    Args:
        experts: T experts of one base, with their heads.
        calibration: unlabelled test images of each task.
        granularity: one coefficient for each `task`, or for each task and `layer` (tensor).
        plus_plus: whether each tau_t is trimmed to its largest entries that agree with the elected
            sign, as in TIES.
        density: share of the entries that `plus_plus` keeps, in (0, 1].
        start: the coefficients at the start, in [0, 1].
        steps: number of steps, >= 0.
        lr: learning rate of Adam, > 0; a step moves a coefficient by about so much.
        batch: images of each task in one step, >= 1.
        seed: of the batches.

    Source: Yang et al. 2024, arXiv:2310.02575, eq. 4 (AdaMerging), after the published code in
        `start`, `lr`, `batch` and `steps`.
    Differs: coefficients are clamped after each step, not inside the model; no graph through the
        T deltas.
    """
    _check(experts, start=start, density=density, steps=steps, lr=lr, batch=batch)
    deltas = {name: experts.deltas(name) for name in experts.merged_names()}
    if plus_plus:
        deltas = trimmed_and_agreed(deltas, density=density)
    combination = Combination(floats(dict(experts.base)), deltas)
    draws = Draws(calibration, experts.names, batch, seed)

    def entropy(params: Params) -> Tensor:
        batches = draws.next()
        features = calibration.merged_features(params, batches)
        answers = [calibration.logits(task, features[task]) for task in batches]
        return torch.stack([mean_entropy(logits) for logits in answers]).sum()

    rows = 1 if granularity == "task" else len(deltas)
    begin = torch.full((rows, len(experts)), start, dtype=torch.float64)
    learned, course = descend(combination, begin, entropy, steps=steps, lr=lr)
    by_tensor = dict(zip(deltas, learned.expand(len(deltas), -1), strict=True))
    changes = ((name, weighted_sum(by_tensor[name], of_each)) for name, of_each in deltas.items())
    rows_told = {name: row.tolist() for name, row in by_tensor.items()}
    facts: dict[str, Any] = {"entropy": [course[0], course[-1]] if course else None}
    if plus_plus:
        # Coefficients of trimmed deltas are not those of the experts' own.
        facts["learned"] = rows_told
    elif granularity == "task":
        facts["coefficients"] = learned[0].tolist()
    else:
        facts["coefficients_by_tensor"] = rows_told
    return Merged(shared=moved(experts.base, changes), structure=experts.structure, facts=facts)


@dataclass(frozen=True)
class Combination:
    """The base and the deltas: theta(lambda), and how a gradient at theta falls on lambda.

    Attributes:
        base: theta_0, every tensor.
        deltas: tau_t of the tensors that move, (T, *s).
    """

    base: Params
    deltas: Mapping[str, Tensor]

    def at(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return the tensors that move at lambda, (L, T) or (1, T); all leaves of a new graph."""
        rows = coefficients.expand(len(self.deltas), -1)
        steps = zip(self.deltas.items(), rows, strict=True)
        moving = ((name, weighted_sum(row, deltas)) for (name, deltas), row in steps)
        tensors = moved({name: self.base[name] for name in self.deltas}, moving)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def pull(self, gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return dL/dlambda, of the shape of `like`, from dL/dtheta in the order of the deltas."""
        rows = [
            torch.zeros_like(like[0])
            if gradient is None
            else (deltas.reshape(len(deltas), -1) @ gradient.to(deltas.dtype).flatten()).to(
                like.dtype
            )
            for deltas, gradient in zip(self.deltas.values(), gradients, strict=True)
        ]
        return torch.stack(rows).sum_to_size(like.shape)


class Draws:
    """Endless seeded batches, one of each task at a time."""

    def __init__(
        self, calibration: Calibration, tasks: Sequence[str], batch: int, seed: int
    ) -> None:
        self._samples = {task: calibration.samples[task] for task in tasks}
        self._streams = [generator(seed, "batches", t) for t in range(len(tasks))]
        self._batch = batch

    def next(self) -> dict[str, Batch]:
        """Return a batch of each task, drawn without replacement."""
        return {
            task: samples.take(torch.randperm(len(samples), generator=stream)[: self._batch])
            for (task, samples), stream in zip(self._samples.items(), self._streams, strict=True)
        }


def descend(
    combination: Combination,
    start: Tensor,
    loss: Callable[[Params], Tensor],
    *,
    steps: int,
    lr: float,
) -> tuple[Tensor, list[float]]:
    """Return lambda after Adam's steps on loss(theta(lambda)), clamped to [0, 1], and the losses.

    Args:
        combination: theta(lambda).
        start: lambda at the start, (L, T) or (1, T); never changed.
        loss: of every tensor of the model, 0-dimensional.
        steps: how many.
        lr: learning rate of Adam.
    """
    learned = start.clone()
    adam = torch.optim.Adam([learned], lr=lr)
    course = []
    for _ in range(steps):
        moving = combination.at(learned)
        value = loss({**combination.base, **moving})
        gradients = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
        learned.grad = combination.pull(gradients, learned)
        adam.step()
        learned.clamp_(0, 1)
        course.append(float(value.detach()))
    return learned, course


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean over images of the entropy of softmax(logits), natural logarithm."""
    log_chances = logits.log_softmax(dim=1)
    return -(log_chances.exp() * log_chances).sum(dim=1).mean()


def trimmed_and_agreed(deltas: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Return each delta's largest entries that have the elected sign, and 0 for the others.

    Args:
        deltas: (T, *s) by name.
        density: share of each delta's entries that is kept before signs are elected, in (0, 1].
    """
    (stats,) = trim_and_elect(deltas.items(), density=[density])
    agreed = {}
    for name, of_each in deltas.items():
        least = stats["thresholds"].to(of_each.dtype).reshape(-1, *[1] * (of_each.ndim - 1))
        kept = of_each * (of_each.abs() >= least)
        sign = kept.sum(dim=0).sign()
        sign = torch.where(sign == 0, float(stats["majority"]()), sign)
        agreed[name] = agreeing(kept, sign)
    return agreed
