"""This file is the head of a task: how each kind is made from the base's features."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.models.heads import fit_ncm, fit_probe, load_embeddings, trained_init

HEADS = ("trained", "frozen-probe", "frozen-ncm", "embeddings")
_EMBEDDINGS = "embeddings:"


def head_kind(head: str) -> str:
    """Return the kind of a head as a card tells it: `embeddings:FILE` is of kind `embeddings`.

    Raises:
        ValueError: no such kind.
    """
    kind = "embeddings" if head.startswith(_EMBEDDINGS) else head
    if kind not in HEADS or head == "embeddings":
        known = [*(name for name in HEADS if name != "embeddings"), "embeddings:FILE"]
        raise ValueError(unknown_name("head", head, known))
    return kind


def needs_features(head: str) -> bool:
    """Return whether the head is fitted to the features of the training images."""
    return head in ("frozen-probe", "frozen-ncm")


def fitted_head(
    head: str, features: Tensor | None, labels: Tensor | None, *, classes: int
) -> Params:
    """Return `weight` (C, d) and `bias` (C,) of a frozen head fitted at the base.

    Args:
        head: `frozen-probe` or `frozen-ncm`.
        features: features of the training images at x0, (N, d).
        labels: their labels, (N,).
        classes: C.
    """
    fit = fit_ncm if head == "frozen-ncm" else fit_probe
    return fit(features, labels, classes)


def unfitted_head(head: str, *, features: int, classes: Sequence[str], seed: int) -> Params:
    """Return `weight` (C, d) and `bias` (C,) of a head that needs no features.

    Args:
        head: `trained` or `embeddings:FILE`.
        features: d.
        classes: names of the C classes.
        seed: seed of the initialisation of a trained head.
    """
    if head.startswith(_EMBEDDINGS):
        return load_embeddings(Path(head.removeprefix(_EMBEDDINGS)), classes)
    return trained_init(features, len(classes), seed)


def head_layer(params: Params, *, trained: bool) -> nn.Linear:
    """Return the linear layer that holds `params`, without a gradient unless it is trained."""
    classes, features = params["weight"].shape
    layer = nn.Linear(features, classes)
    with torch.no_grad():
        layer.weight.copy_(params["weight"])
        layer.bias.copy_(params["bias"])
    return layer.requires_grad_(trained)
