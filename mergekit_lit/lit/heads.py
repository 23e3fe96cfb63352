"""This file is the head of a task: how each kind is made, and the layer that holds it."""

from pathlib import Path

from torch import Tensor, nn

from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.passes import features_of
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.models.heads import (
    apply_head,
    fit_ncm,
    fit_probe,
    load_embeddings,
    trained_init,
)

_EMBEDDINGS = "embeddings:"
_FITTED = {"frozen-ncm": fit_ncm, "frozen-probe": fit_probe}


class Head(nn.Module):
    """A linear classifier on features, or on their cosines where it has a scale."""

    def __init__(self, params: Params, *, trained: bool) -> None:
        """Hold a copy of `params`, with a gradient if the head is trained."""
        super().__init__()
        self.weight = nn.Parameter(params["weight"].clone(), requires_grad=trained)
        self.bias = nn.Parameter(params["bias"].clone(), requires_grad=trained)
        if "scale" in params:
            self.register_buffer("scale", params["scale"].clone())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, d)."""
        return apply_head({**dict(self.named_parameters()), **dict(self.named_buffers())}, features)


def head_kind(head: str) -> str:
    """Return a head's kind as cards tell it: that of `embeddings:FILE` is `embeddings`.

    Raises:
        KeyError: no such kind.
    """
    if head.startswith(_EMBEDDINGS):
        return "embeddings"
    known = ("trained", *_FITTED)
    if head not in known:
        raise KeyError(unknown_name("head", head, (*known, "embeddings:FILE")))
    return head


def head_at(backbone: Backbone, data: TaskData, head: str, *, seed: int) -> dict[str, Tensor]:
    """Return `weight` (C, d) and `bias` (C,) of a task's head at the base.

    Args:
        backbone: the base, its BatchNorm statistics those of the task.
        data: the task.
        head: `trained`, `frozen-probe`, `frozen-ncm` or `embeddings:FILE`.
        seed: seed of the initialisation of a trained head.
    """
    classes = len(data.classes)
    if head in _FITTED:
        features, labels = features_of(backbone, data.train)
        return _FITTED[head](features, labels, classes)
    if head.startswith(_EMBEDDINGS):
        path = Path(head.removeprefix(_EMBEDDINGS))
        return load_embeddings(path, classes, features=backbone.features)
    return trained_init(backbone.features, classes, seed)
