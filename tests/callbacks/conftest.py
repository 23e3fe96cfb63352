"""A tiny module, its data and its Trainer, for callbacks that watch a training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mergekit_lit.core.structure import TensorInfo

STRUCTURE = {
    "1.weight": TensorInfo("linear", 0, "stem"),
    "1.bias": TensorInfo("linear", 0, "stem"),
    "2.weight": TensorInfo("norm", 0, "stem"),
    "2.bias": TensorInfo("norm", 0, "stem"),
    "4.weight": TensorInfo("linear", 1, "block"),
    "4.bias": TensorInfo("linear", 1, "block"),
}


class NotingSGD(torch.optim.SGD):
    """Notes the gradients that it really uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[list[torch.Tensor]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        held = [p for group in self.param_groups for p in group["params"]]
        self.used.append([p.grad.clone() for p in held if p.grad is not None])
        super().step()
        return loss


class TinyModule(LightningModule):
    """A backbone with BatchNorm and dropout, and a head, on 8x8 images of 3 classes."""

    def __init__(
        self,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        *,
        dropout: float = 0.0,
        loss_scale: Callable[[int], float] = lambda _: 1.0,
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 6)
        )
        self.head = nn.Linear(6, 3)
        self.structure = STRUCTURE
        self.make_optimizer = make_optimizer or (lambda p: NotingSGD(p, lr=0.1, momentum=0.9))
        self.loss_scale = loss_scale
        draw = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)).float(), y)
        self.log("train/loss", loss)
        return loss * self.loss_scale(batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Rows(Callback):
    """Keeps the metrics after every micro-batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def _images(n: int = 48, batch: int = 8) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 8, 8, generator=draw), torch.arange(n) % 3
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def _fit(
    module: LightningModule,
    *callbacks: Callback,
    data: Any = None,
    resume: Any = None,
    **arguments: Any,
) -> list[dict[str, float]]:
    """Train for `max_steps` and return the metrics after every micro-batch."""
    rows = Rows()
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **arguments,
    }
    trainer = Trainer(callbacks=[*callbacks, rows], **settings)
    trainer.fit(module, _images() if data is None else data, ckpt_path=resume)
    return rows.rows


@pytest.fixture
def tiny() -> type[TinyModule]:
    """The module's class."""
    torch.manual_seed(0)
    return TinyModule


@pytest.fixture
def images() -> Callable[..., DataLoader[Any]]:
    """Makes a loader of n random images."""
    return _images


@pytest.fixture
def fit() -> Callable[..., list[dict[str, float]]]:
    """Trains and returns the metrics after every micro-batch."""
    return _fit
