"""This file follows the path of a training: travel, length, displacement, stability."""

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from mergekit_lit.callbacks.gradient_noise import GradientNoise
from mergekit_lit.callbacks.view import (
    BACKBONE,
    Samples,
    is_logging_step,
    log_metrics,
    moved_parameters,
    parameter_part,
    training_samples,
)
from mergekit_lit.theory.norms import tensor_norms
from mergekit_lit.theory.stability import PathNoise, stability_estimate
from mergekit_lit.theory.travel import (
    StepRule,
    Travel,
    Value,
    WeightedSquares,
    WeightedSum,
    decayed_share,
    sgd_rule,
)


class PathLength(Callback):
    """Follows the parameters from the base x0: effective travel, path, displacement, stability.

    `path/length` is sum_k ||x_{k+1} - x_k||, `path/displacement` is ||x_k - x0||,
    `path/mean_squared_displacement` is d^2 = (1/||a||_1) sum_k a_k ||x_k - x0||^2. For SGD also
    `path/travel` = sum_k eta_k a_k, exact under any schedule of learning rate and momentum, and
    `path/eps`, the path estimate of stability, where a `GradientNoise` of the same Trainer measures
    tr Sigma and the number of training samples is known.

    Adaptive optimizers have no step weights that the data do not change: travel and eps are
    unknown, d^2 weighs all steps alike, and what is derived from these is "effective (adaptive
    optimizer)". So is a run whose parameter groups differ in learning rate or momentum. Decoupled
    weight decay moves x outside of the gradients: `path/decayed_share` is the share of x0 that it
    has taken away.

    For a module with a `backbone` that is trained, all this is the backbone's (what merging moves),
    and `path/head_displacement` is how far everything else went. Only steps that the optimizer
    really takes count: not those that a loss scaler skips. The numbers stay on the device between
    the steps that the Trainer logs.
    """

    _base: dict[str, Tensor]
    _first_step: int
    _steps: int
    _stepped: bool
    _length: Value
    _even_drift: Value
    _decayed: float
    _travel: Travel | None
    _noise: PathNoise | None

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._depth, self._alone = 0, True
        self._parameters: dict[str, nn.Parameter] = {}
        self._moved: list[Tensor] = []
        self._parts = torch.zeros(0, 2)
        self._squares = torch.zeros(2)
        self._samples: Samples | None = None
        self._meter: GradientNoise | None = None
        self._reset(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember x0, unless the run goes on, and stand behind the optimizer."""
        if trainer.global_step == 0 or not self._base:
            self._reset(trainer.global_step)
        self._parameters = _tracked(trainer, pl_module)
        self._base = {
            name: _wide(self._base.get(name, p)).to(p.device, copy=True)
            for name, p in self._parameters.items()
        }
        self._moved = self._from_base()
        squares = tensor_norms(self._moved).square()
        self._parts = _parts(list(self._parameters), squares)
        self._squares = squares @ self._parts
        self._samples = training_samples(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it untyped
        self._meter = next((c for c in callbacks if isinstance(c, GradientNoise)), None)
        self._release()
        self._depth, self._alone = 0, len(trainer.optimizers) == 1
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._enter_step))
            self._handles.append(optimizer.register_step_post_hook(self._leave_step))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the step that just ended, if the Trainer logs it."""
        if self._stepped and is_logging_step(trainer):
            log_metrics(trainer, self._metrics())
        self._stepped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizer as it was."""
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizer as it was."""
        self._release()

    def card_facts(self) -> dict[str, float | None]:
        """Return the facts of the path; None where unknown or not followed from the first step."""
        facts = self.facts()
        return {name: None if self._first_step else facts.get(name) for name in _CARD}

    def state_dict(self) -> dict[str, Any]:
        """Return x0 and the sums, exact."""
        return {
            "base": {name: tensor.cpu() for name, tensor in self._base.items()},
            "first_step": self._first_step,
            "steps": self._steps,
            "length": float(self._length),
            "even_drift": float(self._even_drift),
            "decayed": self._decayed,
            "travel": None if self._travel is None else _to_numbers(self._travel),
            "noise": None if self._noise is None else _to_numbers(self._noise),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from x0 and the sums of a checkpoint."""
        self._base = dict(state_dict["base"])
        self._first_step, self._steps = state_dict["first_step"], state_dict["steps"]
        self._length, self._even_drift = state_dict["length"], state_dict["even_drift"]
        self._decayed = state_dict["decayed"]
        travel, noise = state_dict["travel"], state_dict["noise"]
        self._travel = None if travel is None else _travel_from(travel)
        self._noise = None if noise is None else _noise_from(noise)

    def _reset(self, step: int) -> None:
        self._base = {}
        self._first_step = step
        self._steps = 0
        self._stepped = False
        self._length, self._even_drift = 0.0, 0.0
        self._decayed = 0.0
        # None for good after a step that was not linear, or whose noise nobody measured.
        self._travel, self._noise = Travel(), PathNoise()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _from_base(self) -> list[Tensor]:
        """Return x_k - x0, tensor by tensor."""
        now = [_wide(p) for p in self._parameters.values()]
        return list(torch._foreach_sub(now, list(self._base.values())))

    def _enter_step(self, *_: Any) -> None:
        self._depth += 1

    def _leave_step(self, optimizer: Optimizer, *_: Any) -> None:
        # An optimizer that calls its parent's `step` passes here once for each.
        self._depth -= 1
        if self._depth == 0:
            self._add_step(optimizer)

    @torch.no_grad()
    def _add_step(self, optimizer: Optimizer) -> None:
        """Add the step that the optimizer just took."""
        self._advance(optimizer, self._squares[0])
        moved = self._from_base()
        # The old displacement is not needed any more: its memory takes the difference.
        torch._foreach_sub_(self._moved, moved)
        norms = tensor_norms([*self._moved, *moved])
        step, self._squares = norms.square().view(2, -1) @ self._parts
        self._length = self._length + step[0].sqrt()
        self._moved = moved
        self._steps += 1
        self._stepped = True

    def _advance(self, optimizer: Optimizer, square: Tensor) -> None:
        """Add what the step was taken from and with: ||x_k - x0||^2, sigma_k^2, eta_k, rho_k."""
        self._even_drift = self._even_drift + square
        self._decayed = decayed_share(self._decayed, **_decoupled_decay(optimizer))
        rule = _rule(optimizer, first=self._steps == 0) if self._alone else None
        moments = self._meter.latest if self._meter else None
        if rule is None or self._travel is None:
            self._travel = self._noise = None
            return
        self._travel = self._travel.advance(rule, displacement_squared=square)
        if moments is None or self._noise is None:
            self._noise = None
        else:
            self._noise = self._noise.advance(moments.trace, rule)

    def _metrics(self) -> dict[str, float]:
        """Return the facts by the names of metrics."""
        return {_METRICS.get(name, f"path/{name}"): value for name, value in self.facts().items()}

    def facts(self) -> dict[str, float]:
        """Return what is known of the path, read back from the device at once."""
        travel = self._travel
        drift = travel.drift.total if travel else self._even_drift
        held = [self._length, drift, *self._squares]
        length, drift, near, rest = torch.stack(
            [torch.as_tensor(x).to(self._squares) for x in held]
        ).tolist()
        facts = {"path_length": length, "displacement": math.sqrt(near)}
        weight = float(travel.weights.total) if travel else float(self._steps)
        if weight > 0:
            facts["mean_squared_displacement"] = drift / weight
        if travel:
            facts["travel"] = float(travel.weights.total)
            facts["travel_squared"] = float(travel.squares.total)
        return facts | self._eps() | self._apart(rest)

    def _eps(self) -> dict[str, float]:
        """Return the stability estimate, if it is known."""
        if self._noise is None or self._samples is None:
            return {}
        squares, coherent = float(self._noise.squares.total), float(self._noise.coherent.total)
        samples = self._samples
        estimate = stability_estimate(squares, coherent, n=samples.n, batch=samples.batch)
        return {"eps_path": math.sqrt(estimate)}

    def _apart(self, rest: float) -> dict[str, float]:
        """Return what is no part of the backbone's way down the gradient, where there is any."""
        facts = {}
        if bool(self._parts[:, 1].any()):
            facts["head_displacement"] = math.sqrt(rest)
        if self._decayed:
            facts["decayed_share"] = self._decayed
        return facts


_CARD = (
    "travel",
    "travel_squared",
    "path_length",
    "displacement",
    "mean_squared_displacement",
    "eps_path",
)
# The metrics whose names are not those of the facts.
_METRICS = {"path_length": "path/length", "eps_path": "path/eps"}


def _tracked(trainer: Trainer, module: LightningModule) -> dict[str, nn.Parameter]:
    """Return what the optimizers move, by name."""
    parameters: dict[str, nn.Parameter] = {}
    for optimizer in trainer.optimizers:
        parameters |= moved_parameters(module, optimizer)
    return parameters


def _parts(names: Sequence[str], like: Tensor) -> Tensor:
    """Return indicators (tensors, 2): part of what is followed, and of the rest."""
    followed = [parameter_part(name) == BACKBONE for name in names]
    if not any(followed):
        followed = [True for _ in names]
    return like.new_tensor([[float(yes), float(not yes)] for yes in followed])


def _wide(parameter: Tensor) -> Tensor:
    """Return the values in float32 or wider, detached."""
    plain = parameter.detach()
    return plain if plain.dtype == torch.float64 else plain.float()


def _rule(optimizer: Optimizer, *, first: bool) -> StepRule | None:
    """Return the step that the optimizer took, if it was linear and one for all parameters."""
    if not isinstance(optimizer, SGD):
        return None
    keys = ("lr", "momentum", "dampening", "nesterov")
    settings = {tuple(float(group[key]) for key in keys) for group in optimizer.param_groups}
    if len(settings) != 1:
        return None
    lr, momentum, dampening, nesterov = settings.pop()
    return sgd_rule(
        lr, momentum=momentum, dampening=dampening, nesterov=bool(nesterov), first=first
    )


def _decoupled_decay(optimizer: Optimizer) -> dict[str, float]:
    """Return learning rate and decoupled weight decay, the largest over the groups."""
    groups = optimizer.param_groups
    decoupled = [g["weight_decay"] for g in groups if g.get("decoupled_weight_decay")]
    lr = max(float(group["lr"]) for group in groups)
    return {"lr": lr, "weight_decay": max(decoupled, default=0.0)}


def _to_numbers(sums: Travel | PathNoise) -> list[list[float]]:
    """Return nested sums as plain numbers, exact."""
    return [[float(number) for number in numbers] for numbers in astuple(sums)]


def _travel_from(numbers: Sequence[Sequence[float]]) -> Travel:
    weights, squares, drift = numbers
    return Travel(WeightedSum(*weights), WeightedSquares(*squares), WeightedSum(*drift))


def _noise_from(numbers: Sequence[Sequence[float]]) -> PathNoise:
    squares, coherent = numbers
    return PathNoise(WeightedSquares(*squares), WeightedSum(*coherent))
