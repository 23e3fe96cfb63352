"""This file watches the norm of the gradient: before clipping, and as the optimizer uses it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from mergekit_lit.callbacks.running import RunningStatistics
from mergekit_lit.callbacks.view import (
    BACKBONE,
    is_logging_step,
    log_metrics,
    moved_parameters,
    parameter_group,
    parameter_part,
)
from mergekit_lit.theory.norms import squared_norm, tensor_norms

_CLIPPING = "configure_gradient_clipping"
# What torch.nn.utils.clip_grad_norm_ adds to the norm that it divides by.
_CLIP_EPS = 1e-6
_NORM, _CLIPPED, _FACTOR = "gradient/norm", "gradient/norm_clipped", "gradient/clip_factor"


class GradientNorm(Callback):
    """Logs L2 norms of the gradient once per optimizer step, and keeps their running statistics.

    `gradient/norm` is the norm after unscaling (fp16) and after the mean over processes and
    accumulated micro-batches, before clipping; `gradient/norm_clipped` is the norm that the
    optimizer uses; `gradient/clip_factor` is their ratio, 1 where nothing was clipped.
    `gradient/norm/<group>` are the norms of the layer groups before clipping; for a module with a
    `backbone` also `gradient/norm/backbone` as a whole. `gradient/norm_mean`, `_std` and `_max` run
    over all steps so far. Steps whose gradient is infinite or NaN (a loss scaler skips them) are
    counted by `gradient/skipped` and enter no statistic.

    Every step is measured, in one pass of foreach kernels that stays on the device; the numbers are
    read back once, when the Trainer logs. Clipping by norm needs no second pass, clipping by value
    or by a module's own `configure_gradient_clipping` does. Under manual optimization the module
    clips by itself: then both norms are of what it hands to the optimizer. Sharded gradients (FSDP)
    are not put together.
    """

    _first_step: int
    _running: RunningStatistics
    _skipped: Tensor
    _latest: Tensor | None
    _layout: "_Layout | None"

    def __init__(self, *, per_parameter: bool = False) -> None:
        """Choose the detail.

        Args:
            per_parameter: whether to log `gradient/parameter/<name>` for each parameter too.
        """
        self.per_parameter = per_parameter
        self._reset(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless the run goes on; stand around the clipping."""
        if trainer.global_step == 0 or not self._running.names:
            self._reset(trainer.global_step)
        self._watch_clipping(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure under manual optimization, where Lightning clips nothing."""
        if not pl_module.automatic_optimization:
            norms = self._norms(trainer, pl_module, optimizer)
            self._record(norms, norms[0])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the step that just ended, if the Trainer logs it."""
        if self._latest is not None and is_logging_step(trainer):
            log_metrics(trainer, self._metrics(self._latest))
        # Micro-batches that only accumulate leave nothing to log.
        self._latest = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        vars(pl_module).pop(_CLIPPING, None)

    def statistics(self) -> dict[str, dict[str, float]]:
        """Return `mean`, `std` and `max` of each norm over all steps so far, by metric."""
        columns = zip(*self._running.rows().tolist(), strict=True)
        rows = [dict(zip(("mean", "std", "max"), column, strict=True)) for column in columns]
        return dict(zip(self._running.names, rows, strict=True))

    def card_facts(self) -> dict[str, float | None]:
        """Return the mean norm before clipping; None unless watched from the first step."""
        mean = self.statistics().get(_NORM, {}).get("mean")
        return {"gradient_norm": None if self._first_step else mean}

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics."""
        return {
            "first_step": self._first_step,
            "skipped": int(self._skipped),
            "running": self._running.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the running statistics of a checkpoint."""
        self._reset(state_dict["first_step"])
        self._skipped = torch.tensor(state_dict["skipped"])
        self._running.load_state_dict(state_dict["running"])

    def _reset(self, step: int) -> None:
        self._first_step = step
        self._running = RunningStatistics()
        self._skipped = torch.tensor(0)
        self._latest = None
        self._layout = None

    def _watch_clipping(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure around the module's hook: nothing runs between it and the optimizer."""
        vars(module).pop(_CLIPPING, None)
        clip: Callable[..., None] = getattr(module, _CLIPPING)
        overridden = is_overridden(_CLIPPING, module)

        def watched(
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            norms = self._norms(trainer, module, optimizer)
            clip(
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
            )
            used = norms[0]
            if overridden or (gradient_clip_val and gradient_clip_algorithm == "value"):
                used = squared_norm(list(_gradients(optimizer).values())).sqrt()
            elif gradient_clip_val:
                used = used * (gradient_clip_val / (used + _CLIP_EPS)).clamp(max=1.0)
            self._record(norms, used)

        setattr(module, _CLIPPING, watched)

    def _norms(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Tensor:
        """Return the norms that the layout names, (names,); the first is the whole gradient's."""
        gradients = _gradients(optimizer)
        if self._layout is None or self._layout.parameters != tuple(gradients):
            self._layout = _layout(module, optimizer, gradients, per_parameter=self.per_parameter)
        squares = tensor_norms(list(gradients.values())).square()
        sums = squares.new_zeros(len(self._layout.names))
        sums.index_add_(0, self._layout.rows, squares[self._layout.columns])
        return sums.sqrt() / _scale(trainer, optimizer, sums)

    def _record(self, norms: Tensor, used: Tensor) -> None:
        """Add one step to the running statistics."""
        norm = norms[0]
        factor = torch.where(norm > 0, used / norm, torch.ones_like(norm))
        row = torch.cat([torch.stack([norm, used, factor]), norms[1:]])
        self._latest = row
        self._running.update(self._names(), row)
        self._skipped = self._skipped.to(norm.device) + ~norm.isfinite()

    def _names(self) -> tuple[str, ...]:
        names = self._layout.names if self._layout else (_NORM,)
        return (_NORM, _CLIPPED, _FACTOR, *names[1:])

    def _metrics(self, latest: Tensor) -> dict[str, float]:
        """Read everything back from the device at once."""
        running = self._running.rows()[:, 0]
        numbers = torch.cat([latest, running, self._skipped.to(latest).view(1)]).tolist()
        overall = (f"{_NORM}_mean", f"{_NORM}_std", f"{_NORM}_max", "gradient/skipped")
        return dict(zip((*self._names(), *overall), numbers, strict=True))


@dataclass(frozen=True)
class _Layout:
    """Which parameter counts towards which norm.

    Attributes:
        parameters: ids of the parameters that have a gradient, in the optimizer's order.
        names: metric of each norm; the first is the whole gradient's.
        rows: for each contribution, the norm that it counts towards.
        columns: for each contribution, the parameter that it comes from.
    """

    parameters: tuple[int, ...]
    names: tuple[str, ...]
    rows: Tensor
    columns: Tensor


def _layout(
    module: LightningModule,
    optimizer: Optimizer,
    gradients: Mapping[int, Tensor],
    *,
    per_parameter: bool,
) -> _Layout:
    named = {id(p): name for name, p in moved_parameters(module, optimizer).items()}
    pairs: list[tuple[str, int]] = []
    for column, identity in enumerate(gradients):
        pairs.append((_NORM, column))
        name = named.get(identity)
        if name is not None:
            pairs += [(metric, column) for metric in _metrics_of(module, name, per_parameter)]
    names = tuple(dict.fromkeys(metric for metric, _ in pairs)) or (_NORM,)
    place = {metric: row for row, metric in enumerate(names)}
    device = next(iter(gradients.values())).device if gradients else torch.device("cpu")
    return _Layout(
        tuple(gradients),
        names,
        torch.tensor([place[metric] for metric, _ in pairs], device=device, dtype=torch.long),
        torch.tensor([column for _, column in pairs], device=device, dtype=torch.long),
    )


def _metrics_of(module: LightningModule, name: str, per_parameter: bool) -> list[str]:  # noqa: FBT001
    """Return the metrics that a parameter counts towards, the whole gradient's left out."""
    groups = {parameter_group(module, name)}
    if parameter_part(name) == BACKBONE:
        groups.add(BACKBONE)
    metrics = [f"{_NORM}/{group}" for group in sorted(groups)]
    return [*metrics, f"gradient/parameter/{name}"] if per_parameter else metrics


def _gradients(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return the gradients that the optimizer is about to use, by the id of their parameter."""
    held = (p for group in optimizer.param_groups for p in group["params"])
    gradients = {id(p): p.grad for p in held if p.grad is not None}
    return {key: g.coalesce().values() if g.is_sparse else g for key, g in gradients.items()}


def _scale(trainer: Trainer, optimizer: Optimizer, like: Tensor) -> Tensor:
    """Return the loss scale that the gradients still carry: fused optimizers unscale by themselves.

    The scale stays on the device: reading it would cost a synchronisation.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    one = torch.ones((), device=like.device)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return one
    scaled: Tensor = scaler.scale(one)
    return scaled
