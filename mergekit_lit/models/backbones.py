"""This file is the backbones: any encoder by name, as one kind of module, and its first weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergekit_lit.core.expert_files import load_base_file
from mergekit_lit.core.experts import Base
from mergekit_lit.core.params import content_hash
from mergekit_lit.models.encoders import EFFICIENTNET, HALF, make_encoder, unfit_size
from mergekit_lit.models.structure import structure_of
from mergekit_lit.models.weights import (
    OURS,
    adapt,
    efficientnet_lite0,
    file_weights,
    hub_weights,
    shipped_weights,
)


class Backbone(nn.Module):
    """An encoder without its classifier: images (B, 3, H, W), normalised, to features (B, d).

    Its tensors carry the encoder's own names, so that files of timm and torchvision fit.

    Attributes:
        name: what `build_backbone` builds it by.
        features: d, length of a feature vector.
        image_size: height and width that it expects, in pixels.
        mean: mean of the pixels that it expects to be subtracted, per channel, in [0, 1].
        std: their standard deviation, per channel, in [0, 1].
    """

    _encoder: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        features: int,
        image_size: int,
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
    ) -> None:
        super().__init__()
        # The encoder is not a child: its tables are ours, so names gain no prefix and
        # functional_call, which swaps tensors in these tables, reaches its forward.
        self.__dict__["_encoder"] = encoder
        self._parameters = encoder._parameters
        self._buffers = encoder._buffers
        self._modules = encoder._modules
        self._non_persistent_buffers_set = encoder._non_persistent_buffers_set
        self.name = name
        self.features = features
        self.image_size = image_size
        self.mean = mean
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, d)."""
        return cast("Tensor", self._encoder.forward(x))

    def train(self, mode: bool = True) -> "Backbone":  # noqa: FBT001 - nn.Module's signature
        """Set training mode on the encoder too."""
        self._encoder.training = mode
        super().train(mode)
        return self


def build_backbone(name: str, image_size: int | None = None) -> Backbone:
    """Build an encoder with the weights that its library draws.

    Args:
        name: `resnet` or `vit` (the two small ones that we ship), `efficientnet_lite0`,
            `timm/NAME` or NAME, `torchvision/NAME`.
        image_size: height and width of the input in pixels; None for the encoder's own.

    Raises:
        KeyError: no such encoder.
        ValueError: it cannot take this image size.
    """
    backbone = Backbone(**make_encoder(name, image_size)._asdict())
    _check_forward(backbone, name)
    return backbone


def load_base(spec: str, *, image_size: int | None = None) -> tuple[Backbone, Base]:
    """Build a backbone, give it its initial weights, and describe it as a base.

    Args:
        spec: `resnet` or `vit`, as shipped; `efficientnet_lite0`, ImageNet weights of the extra;
            `timm/NAME[.tag]` or `torchvision/NAME`, weights of the library's hub;
            `NAME@FILE.safetensors`, weights from a file; `NAME@random:SEED`; or our base file.
        image_size: height and width of the input in pixels; None for the encoder's own.

    Raises:
        KeyError: no such encoder.
        FileNotFoundError: no such file.
        ValueError: the weights do not fit the encoder.
        ModuleNotFoundError: the weights are in an extra that is not installed.
        ConnectionError: the hub cannot be reached.
    """
    name, at, source = spec.partition("@")
    if at and not source:
        raise ValueError(
            f"A base must name its weights after `@`, but is {spec!r}. Write {name}, "
            f"{name}@FILE.safetensors or {name}@random:0."
        )
    if not source and name.endswith(".safetensors"):
        return _load_base_file(Path(name), image_size)
    if source.startswith("random:"):
        backbone = _random(name, image_size, source.removeprefix("random:"))
        return backbone, describe_base(backbone, spec, {"initialisation": "random"})
    backbone = build_backbone(name, image_size)
    weights, facts = _weights_of(name, source)
    fitted, dropped = adapt(weights, backbone._encoder, source=spec)
    backbone.load_state_dict(fitted)
    facts = {**facts, "dropped": dropped} if dropped else facts
    return backbone, describe_base(backbone, spec, facts)


def describe_base(backbone: Backbone, name: str, facts: Mapping[str, Any]) -> Base:
    """Return the base that a backbone stands at now, with copies of its tensors."""
    params = {key: tensor.detach().clone() for key, tensor in backbone.state_dict().items()}
    return Base(
        name=name,
        backbone=backbone.name,
        image_size=backbone.image_size,
        params=params,
        structure=structure_of(backbone),
        content=content_hash(params),
        facts=dict(facts),
    )


def _check_forward(backbone: Backbone, name: str) -> None:
    """Check that one image of zeros becomes one feature vector, by far cheaper than the building.

    It leaves the global random stream and the statistics of norm layers as they are.

    Raises:
        ValueError: the encoder cannot take its image size.
    """
    size = backbone.image_size
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            features = backbone.eval()(torch.zeros(1, 3, size, size))
    # What an encoder raises is its own choice: RuntimeError, AssertionError, IndexError, ...
    except Exception as error:
        raise unfit_size(name, size, error) from None
    backbone.train()
    if not isinstance(features, Tensor) or features.shape != (1, backbone.features):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"A backbone must turn an image into one feature vector of length {backbone.features}, "
            f"but {name!r} makes {found} of it. Take an encoder that pools."
        )


def _weights_of(name: str, source: str) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the tensors that a spec names, by the names of its encoder, and facts about them."""
    if source:
        return file_weights(Path(source))
    if name in OURS:
        return shipped_weights(name)
    if name == EFFICIENTNET:
        return efficientnet_lite0()
    return hub_weights(name)


def _load_base_file(path: Path, image_size: int | None) -> tuple[Backbone, Base]:
    """Return what a base file of ours holds."""
    weights, header = load_base_file(path)
    told = header["base"]
    backbone = build_backbone(told["backbone"], image_size or told["image_size"])
    fitted, _ = adapt(weights, backbone._encoder, source=str(path))
    backbone.load_state_dict(fitted)
    return backbone, describe_base(backbone, told["name"], header["facts"])


def _random(name: str, image_size: int | None, seed: str) -> Backbone:
    """Return a backbone drawn from a seed, leaving the global stream as it was."""
    if not seed.isdecimal() or int(seed) >= 2**63:
        raise ValueError(
            f"The seed of a random base must be a whole number below 2^63, but is {seed!r}. Write "
            f"{name}@random:0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return build_backbone(name, image_size)
