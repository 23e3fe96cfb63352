"""This file carries a twin of a training: the same run with a few training images replaced."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mergekit_lit.core.seeds import generator
from mergekit_lit.data.batches import Batch
from mergekit_lit.data.splits import Images
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.sync import SyncedBatchNorm, means_over_processes


class Twin:
    """A copy of a module that takes every step of the original's run on data of its own.

    Everything but the data is shared or copied: where the run starts, the order of the batches,
    what augmentation and dropout draw (`ExpertModule` keys both by seed, step and slot), learning
    rate and other settings of each step, precision, loss scale, and whether a step is taken at all.

    Attributes:
        module: the copy.
        optimizer: its optimizer.
    """

    def __init__(
        self, module: ExpertModule, trainer: Trainer, positions: Tensor, others: Images
    ) -> None:
        """Copy a module as it stands, before its first step or with a state to be loaded.

        Args:
            module: the original; left as it is.
            trainer: its Trainer.
            positions: training samples that are replaced, (m,).
            others: what replaces them, m images.
        """
        self.module = _copied(module)
        trained = (p for p in self.module.parameters() if p.requires_grad)
        self.optimizer = module.optimization.build(trained)
        # Row of the replacement of each training sample; -1 keeps the sample.
        self._row = torch.full((len(module.data.task_data.train),), -1)
        self._row[positions] = torch.arange(len(positions))
        self._others = others
        self._trainer = trainer
        self._scale = 1.0

    def round_up(self, seed: int) -> None:
        """Move each weight of the backbone to a floating-point neighbour, at random up or down."""
        draw = generator(seed, "rounding")
        with torch.no_grad():
            for parameter in self.module.backbone.parameters():
                up = torch.rand(parameter.shape, generator=draw).to(parameter.device) < 0.5
                ends = torch.where(up, torch.inf, -torch.inf).to(parameter)
                parameter.copy_(torch.nextafter(parameter, ends))

    def backward(self, batch: Batch, batch_idx: int) -> bool:
        """Add the gradient of one micro-batch, and return whether it held a replaced sample."""
        precision = self._trainer.precision_plugin
        seen = self._seen(batch)
        with precision.train_step_context():
            loss = self.module.training_step(seen, batch_idx)
        scaler = getattr(precision, "scaler", None)
        # The original's step may change the scale before this one's gradient is unscaled.
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        share = loss / self._trainer.accumulate_grad_batches
        torch.autograd.backward(share if scaler is None else share * self._scale)
        self.module.on_after_backward()
        return seen is not batch

    def step(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Take the step that the original took.

        Args:
            settings: the original's parameter groups of this step: learning rate, momentum ...
        """
        for own, group in zip(self.optimizer.param_groups, settings, strict=True):
            own.update(group)
        self._finish_gradients()
        clip = self._trainer.gradient_clip_val
        if clip:
            algorithm = self._trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
            self._trainer.precision_plugin.clip_gradients(
                self.optimizer, clip_val=clip, gradient_clip_algorithm=algorithm
            )
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Forget the gradient, where the original's step is skipped too."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, buffers and the optimizer's state."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _seen(self, batch: Batch) -> Batch:
        """Return a batch with the replaced samples in it; the same object where there are none."""
        x, y, positions = batch
        rows = self._row[positions.cpu()]
        at = (rows >= 0).nonzero().flatten()
        if len(at) == 0:
            return batch
        chosen = rows[at].numpy()
        x, y = x.clone(), y.clone()
        x[at] = torch.from_numpy(self._others.x[chosen]).to(x)
        y[at] = torch.from_numpy(self._others.y[chosen]).to(y)
        return x, y, positions

    def _finish_gradients(self) -> None:
        """Average the gradients over processes, and take the loss scale out of them."""
        gradients = [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if self._trainer.world_size > 1:
            torch._foreach_copy_(gradients, means_over_processes(gradients, self._trainer.strategy))
        if self._scale != 1.0:
            torch._foreach_div_(gradients, self._scale)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, without the parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _copied(module: ExpertModule) -> ExpertModule:
    """Return a copy that logs nothing, attached to the same Trainer."""
    # A Trainer holds loaders, loggers and all callbacks, which are no part of the twin.
    trainer, module._trainer = module._trainer, None
    try:
        twin = copy.deepcopy(module)
    finally:
        module._trainer = trainer
    twin._trainer = trainer
    vars(twin).update({"log": _ignore, "log_dict": _ignore})
    _sync_again(twin.backbone)
    if module.finetuning.compiles:
        twin.backbone.compile()
    return twin


def _sync_again(backbone: nn.Module) -> None:
    """Let BatchNorm layers that share their statistics keep them in the copy, not the original."""
    layers = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    if any("forward" in vars(layer) for layer in layers):
        SyncedBatchNorm().revert(backbone)
        SyncedBatchNorm().apply(backbone)


def _ignore(*_: object, **__: object) -> None:
    """Log nothing."""
