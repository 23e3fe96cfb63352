"""This file is the backbones: any encoder by name, as one kind of module, and its first weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from torch import Tensor, nn

from mergekit_lit.core.experts import Base, load_base_file
from mergekit_lit.core.params import content_hash
from mergekit_lit.core.registry import unknown_name
from mergekit_lit.models.architectures import SmallResNet, small_vit
from mergekit_lit.models.structure import structure_of
from mergekit_lit.models.weights import (
    Enclosed,
    adapt,
    efficientnet_lite0,
    file_weights,
    hub_weights,
    shipped_weights,
)

OURS = ("resnet", "vit")
EFFICIENTNET = "efficientnet_lite0"
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


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
        mean: tuple[float, ...] = _HALF,
        std: tuple[float, ...] = _HALF,
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
    if image_size is not None and image_size < 8:
        raise ValueError(f"`image_size` must be at least 8 pixels, but is {image_size}.")
    if name in OURS:
        return _build_ours(name, image_size or 32)
    library, _, rest = name.rpartition("/")
    if library == "torchvision":
        return _build_torchvision(rest, image_size)
    if library in ("", "timm"):
        return _build_timm(rest, image_size)
    raise KeyError(unknown_name("library of backbones", library, ["timm", "torchvision"]))


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
    name, _, source = spec.partition("@")
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
    if not seed.isdecimal():
        raise ValueError(
            f"The seed of a random base must be a whole number, but is {seed!r}. Write "
            f"{name}@random:0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return build_backbone(name, image_size)


def _build_ours(name: str, image_size: int) -> Backbone:
    if name == "vit" and image_size % 8:
        raise ValueError(
            f"`image_size` of 'vit' must be a multiple of its patch of 8 pixels, but is "
            f"{image_size}."
        )
    encoder: Any = SmallResNet() if name == "resnet" else small_vit(image_size)
    return Backbone(encoder, name=name, features=encoder.num_features, image_size=image_size)


def _build_timm(name: str, image_size: int | None) -> Backbone:
    architecture = "tf_efficientnet_lite0" if name == EFFICIENTNET else name
    if not timm.is_model(architecture):
        known = (*OURS, EFFICIENTNET, *timm.list_models())
        raise KeyError(_unknown_backbone(architecture, known))
    config: Any = timm.get_pretrained_cfg(architecture, allow_unregistered=False)
    size = image_size or config.input_size[-1]
    # Only encoders with a fixed input (ViTs) take a size: the others refuse the argument.
    sized: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    try:
        encoder: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **sized)
    except (AssertionError, TypeError) as error:
        raise _unfit_size(name, size, str(error)) from None
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", (1, 1))
    if size % patch[0]:
        raise _unfit_size(name, size, f"its patch is {patch[0]} pixels wide")
    mean, std = config.mean, config.std
    if name == EFFICIENTNET:
        mean, std = _HALF, _HALF
    return Backbone(
        encoder,
        name=name if name == EFFICIENTNET else f"timm/{name}",
        features=getattr(encoder, "head_hidden_size", None) or encoder.num_features,
        image_size=size,
        mean=tuple(mean),
        std=tuple(std),
    )


def _build_torchvision(name: str, image_size: int | None) -> Backbone:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise KeyError(_unknown_backbone(name, known))
    size = image_size or 224
    sized = {"image_size": size} if name.startswith("vit_") else {}
    try:
        encoder = torchvision.models.get_model(name, weights=None, **sized)
    except (AssertionError, ValueError) as error:
        raise _unfit_size(name, size, str(error)) from None
    features = _strip_classifier(encoder, name)
    # Backbone's tables are its encoder's, so a child called `features` would hide their number.
    clashes = "features" in dict(encoder.named_children())
    return Backbone(
        Enclosed(encoder) if clashes else encoder,
        name=f"torchvision/{name}",
        features=features,
        image_size=size,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    )


def _unfit_size(name: str, size: int, reason: str) -> ValueError:
    return ValueError(
        f"`image_size` must fit the encoder, but {name!r} cannot take {size} pixels: {reason}. "
        "Give another `image_size`."
    )


def _strip_classifier(encoder: nn.Module, name: str) -> int:
    """Replace the last linear layer by the identity and return the length of its input."""
    linear = [(path, m) for path, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    auxiliary = any(path.startswith(("aux", "AuxLogits")) for path, _ in linear)
    if not linear or linear[-1][1].out_features != 1000 or auxiliary:
        raise ValueError(
            f"A torchvision backbone must end in one linear classifier, but {name!r} does not. "
            "Take a ResNet, ViT, EfficientNet, ConvNeXt, Swin or RegNet."
        )
    path, layer = linear[-1]
    parent, _, child = path.rpartition(".")
    setattr(encoder.get_submodule(parent), child, nn.Identity())
    return layer.in_features


def _unknown_backbone(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Return the message for an unknown encoder: over a thousand are known, so not all of them."""
    hint = unknown_name("backbone", name, known).partition(" Known:")[0]
    return f"{hint} Known: resnet, vit, {EFFICIENTNET}, timm/NAME, torchvision/NAME."
