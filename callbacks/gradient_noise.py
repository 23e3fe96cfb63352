"""This file measures gradient noise while a model trains, without touching the training."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from mergekit_lit.callbacks.view import Samples, log_metrics, step_ended, training_samples
from mergekit_lit.core.seeds import derive_seed, generator
from mergekit_lit.lit.randomness import seed_stream
from mergekit_lit.theory.noise import GradientMoments, gradient_moments, noise_scale
from mergekit_lit.theory.norms import squared_norm

# A fixed power of two, so that fp16 gradients neither vanish nor round on the way back.
_FP16_SCALE = 2.0**10


class GradientNoise(Callback):
    """Estimates tr Sigma and |G|^2 along the path, from micro-batches of its own.

    Before steps 0, 1, 3, 9 ... and then before every `every`-th optimizer step it draws
    `micro_batches` disjoint micro-batches from the training data and takes the gradient of
    `training_step` on each, over all parameters that need one. So a short run rests on several
    estimates too, and at which steps they are made does not depend on its length. The estimates are
    U-statistics, corrected for drawing without replacement. `noise/trace` is tr Sigma of one
    sample, `noise/signal` is |G|^2 (which may come out negative), `noise/scale` is
    B_simple = EMA(tr Sigma) / EMA(|G|^2) in samples.

    The module is in eval mode meanwhile (in train mode BatchNorm makes a micro-batch gradient
    another function); its gradients, buffers, plain attributes, metrics and logs, and all random
    states, are as before afterwards. Together the micro-batches are as large as one optimizer
    step's batch, so that an estimate costs one to two steps. Processes share the micro-batches: the
    draw, and so the estimate, is that of one process.

    Data that can only be iterated over cannot be drawn from: then the last `micro_batches` training
    batches of each process serve, without the correction, from the first time that so many are
    there.

    Source: McCandlish et al. 2018, arXiv:1812.06162, app. A.1.
    """

    _first_step: int
    _next: int
    _count: int
    _steps: int
    _trace_sum: float
    _trace_average: float
    _signal_average: float
    _latest: GradientMoments | None
    _samples: Samples | None
    _recent: deque[Any]

    def __init__(
        self, *, every: int = 50, micro_batches: int = 4, decay: float = 0.9, seed: int = 0
    ) -> None:
        """Choose how often and how finely.

        Args:
            every: optimizer steps between two estimates, at least 1; fewer at the start of a run.
            micro_batches: gradients in one estimate, at least 2.
            decay: weight of the past in the moving averages of `noise/scale`, in [0, 1).
            seed: seed of the draw.

        Raises:
            ValueError: an argument outside its range.
        """
        for name, value, least in (("every", every, 1), ("micro_batches", micro_batches, 2)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), but is {decay}.")
        self.every, self.micro_batches, self.decay, self.seed = every, micro_batches, decay, seed
        self._reset(0)

    @property
    def latest(self) -> GradientMoments | None:
        """The last estimate, or None before the first."""
        return self._latest

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, unless the run goes on; find the training data."""
        if trainer.global_step == 0 or self._latest is None:
            self._reset(trainer.global_step)
        self._samples = training_samples(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Estimate if it is time, at the parameters that the coming step starts from."""
        due = trainer.global_step >= self._next
        if not due or (self._samples is None and len(self._recent) < self.micro_batches):
            return
        moments = self._estimate(trainer, pl_module)
        self._next = self._after(trainer.global_step)
        # Overflow in fp16 is a fact of its scale, not of the noise.
        if math.isfinite(moments.signal) and math.isfinite(moments.trace):
            self._add(moments)
            log_metrics(trainer, self._metrics(moments))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the step under the latest estimate; keep the batch of data not to be drawn from."""
        if self._latest is not None and step_ended(trainer, batch_idx):
            self._steps += 1
            self._trace_sum += self._latest.trace
        if self._samples is None:
            self._recent.append(batch)

    def card_facts(self) -> dict[str, float | None]:
        """Return tr Sigma, averaged over the steps, and the number of estimates of it.

        At each step the latest estimate counts. None unless followed from the first step.
        """
        known = self._steps > 0 and self._first_step == 0
        return {
            "gradient_noise": self._trace_sum / self._steps if known else None,
            "noise_estimates": self._count if known else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the estimates so far."""
        latest = None if self._latest is None else asdict(self._latest)
        numbers = {name: getattr(self, f"_{name}") for name in _STATE}
        return {"latest": latest, **numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the estimates of a checkpoint."""
        self._reset(0)
        for name in _STATE:
            setattr(self, f"_{name}", state_dict[name])
        latest = state_dict["latest"]
        self._latest = None if latest is None else GradientMoments(**latest)

    def _reset(self, step: int) -> None:
        self._first_step = self._next = step
        self._count, self._steps, self._trace_sum = 0, 0, 0.0
        self._trace_average, self._signal_average = 0.0, 0.0
        self._latest = None
        self._samples = None
        self._recent = deque(maxlen=self.micro_batches)

    def _after(self, step: int) -> int:
        """Return the step before which the estimate after that of `step` is due."""
        if step < self.every:
            return min(max(1, 3 * step), self.every)
        return (step // self.every + 1) * self.every

    def _add(self, moments: GradientMoments) -> None:
        keep, self._latest = self.decay, moments
        self._count += 1
        self._trace_average = keep * self._trace_average + (1 - keep) * moments.trace
        self._signal_average = keep * self._signal_average + (1 - keep) * moments.signal

    def _metrics(self, moments: GradientMoments) -> dict[str, float]:
        metrics = {"noise/trace": moments.trace, "noise/signal": moments.signal}
        # Both averages start at 0, so the bias of their start cancels.
        scale = noise_scale(self._trace_average, self._signal_average)
        return metrics if scale is None else {**metrics, "noise/scale": scale}

    def _estimate(self, trainer: Trainer, module: LightningModule) -> GradientMoments:
        """Return the moments over the micro-batches of all processes."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        squares, count = torch.zeros((), device=module.device), 0
        with _untouched(module):
            seed_stream(derive_seed(self.seed, "noise", trainer.global_step), module.device)
            batches, size = self._batches(trainer)
            for index, batch in enumerate(batches):
                gradient = _gradient(trainer, module, parameters, batch, index)
                torch._foreach_add_(total, gradient)
                squares, count = squares + squared_norm(gradient), count + 1
        square, of_each, count = _over_processes(trainer, total, squares, count)
        population = self._samples.n if self._samples else None
        return gradient_moments(square, of_each, count=count, batch=size, population=population)

    def _batches(self, trainer: Trainer) -> tuple[Iterable[Any], int]:
        """Return this process's micro-batches on its device, and the samples in each."""
        samples, count = self._samples, self.micro_batches
        if samples is None:
            return list(self._recent), int(extract_batch_size(self._recent[0]))
        if samples.n < count:
            raise ValueError(
                f"Gradient noise needs at least {count} training samples, one a micro-batch, but "
                f"there are {samples.n}. Leave out GradientNoise or lower its `micro_batches`."
            )
        size = max(1, min(samples.batch, samples.n) // count)
        draw = generator(self.seed, "noise", trainer.global_step)
        parts = torch.randperm(samples.n, generator=draw)[: count * size].view(count, size)
        mine = parts[trainer.global_rank :: trainer.world_size]
        return (_on_device(trainer, samples.take(part)) for part in mine), size


_STATE = ("first_step", "next", "count", "steps", "trace_sum", "trace_average", "signal_average")


def _on_device(trainer: Trainer, batch: Any) -> Any:
    """Return the batch as the training loop would hand it to `training_step`."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _gradient(
    trainer: Trainer,
    module: LightningModule,
    parameters: Sequence[nn.Parameter],
    batch: Any,
    index: int,
) -> list[Tensor]:
    """Return the gradient of one micro-batch's loss, without touching `.grad`."""
    scale = _FP16_SCALE if getattr(trainer.precision_plugin, "scaler", None) else 1.0
    named = (
        {"batch_idx": index} if "batch_idx" in signature(module.training_step).parameters else {}
    )
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        output = module.training_step(batch, **named)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"GradientNoise needs a loss from `training_step`, but got {type(loss).__name__}. "
                "Return the loss, or leave out GradientNoise."
            )
    parts = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    zeros = (
        torch.zeros_like(p) if part is None else part
        for p, part in zip(parameters, parts, strict=True)
    )
    return [part / scale for part in zeros]


def _over_processes(
    trainer: Trainer, total: list[Tensor], squares: Tensor, count: int
) -> tuple[float, float, int]:
    """Return ||sum of gradients||^2, the sum of their squared norms, and their number."""
    if trainer.world_size > 1:
        flat = torch.cat([part.flatten() for part in total])
        numbers = torch.stack([squares, squares.new_tensor(float(count))])
        total = [trainer.strategy.reduce(flat, reduce_op="sum")]
        numbers = trainer.strategy.reduce(numbers, reduce_op="sum")
        squares, count = numbers[0], round(float(numbers[1]))
    square, sum_of_squares = torch.stack([squared_norm(total), squares]).tolist()
    return square, sum_of_squares, count


@contextmanager
def _untouched(module: LightningModule) -> Iterator[None]:
    """Put the module in eval mode and its logging aside; leave no trace of what it then does.

    Buffers, plain tensors (states of metrics among them) and lists are exchanged for copies, so
    whatever changes them changes the copies.
    """
    parts = list(module.modules())
    before = [dict(vars(part)) for part in parts]
    with isolate_rng(include_cuda=module.device.type == "cuda"):
        try:
            for part, state in zip(parts, before, strict=True):
                vars(part).update({name: _copy(value) for name, value in state.items()})
                vars(part)["_buffers"] = {name: _copy(b) for name, b in part._buffers.items()}
                vars(part)["training"] = False
            vars(module).update({"log": _ignore, "log_dict": _ignore})
            yield
        finally:
            for part, state in zip(parts, before, strict=True):
                vars(part).clear()
                vars(part).update(state)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


def _ignore(*_: object, **__: object) -> None:
    """Log nothing."""
