"""This file is the encoders by name: ours, timm's and torchvision's, without their classifiers."""

from typing import Any, NamedTuple

import timm
import torchvision
from torch import nn

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.models.architectures import SmallResNet, small_vit
from mergekit_lit.models.weights import OURS, Enclosed

EFFICIENTNET = "efficientnet_lite0"
_SIZES = (8, 2048)
HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(NamedTuple):
    """What a backbone is made of; see there."""

    encoder: nn.Module
    name: str
    features: int
    image_size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


def make_encoder(name: str, image_size: int | None) -> Encoder:
    """Build an encoder with the weights that its library draws; see `build_backbone`.

    Raises:
        KeyError: no such encoder.
        ValueError: its library refuses this image size.
    """
    smallest, largest = _SIZES
    if image_size is not None and not smallest <= image_size <= largest:
        raise ValueError(
            f"`image_size` must lie in {smallest}..{largest} pixels, but is {image_size}."
        )
    library, _, rest = name.rpartition("/")
    if name in OURS:
        return _ours(name, image_size or 32)
    if library == "torchvision":
        return _of_torchvision(rest, image_size)
    if library in ("", "timm"):
        return _of_timm(rest, image_size)
    raise KeyError(unknown_name("library of backbones", library, ["timm", "torchvision"]))


def _ours(name: str, image_size: int) -> Encoder:
    if name == "vit" and image_size % 8:
        raise ValueError(
            f"`image_size` of 'vit' must be a multiple of its patch of 8 pixels, but is "
            f"{image_size}."
        )
    encoder: Any = SmallResNet() if name == "resnet" else small_vit(image_size)
    return Encoder(encoder=encoder, name=name, features=encoder.num_features, image_size=image_size)


def _of_timm(name: str, image_size: int | None) -> Encoder:
    architecture = "tf_efficientnet_lite0" if name == EFFICIENTNET else name
    if not timm.is_model(architecture):
        known = (*OURS, EFFICIENTNET, *timm.list_models())
        raise KeyError(_unknown_backbone(architecture, known))
    try:
        config: Any = timm.get_pretrained_cfg(architecture, allow_unregistered=False)
    except RuntimeError:
        plain, _, tag = architecture.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{plain}.*")]
        raise KeyError(unknown_name(f"weights of {plain!r}", tag, tags)) from None
    size = image_size or config.input_size[-1]
    # Only encoders with a fixed input (ViTs) take a size: the others refuse the argument.
    sized: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    try:
        encoder: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **sized)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise unfit_size(name, size, error) from None
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", 1)
    width = patch if isinstance(patch, int) else patch[0]
    if size % width:
        raise unfit_size(name, size, f"its patch is {width} pixels wide")
    mean, std = config.mean, config.std
    if name == EFFICIENTNET:
        mean, std = HALF, HALF
    return Encoder(
        encoder=_enclosed(encoder),
        name=name if name == EFFICIENTNET else f"timm/{name}",
        features=getattr(encoder, "head_hidden_size", None) or encoder.num_features,
        image_size=size,
        mean=tuple(mean),
        std=tuple(std),
    )


def _of_torchvision(name: str, image_size: int | None) -> Encoder:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise KeyError(_unknown_backbone(name, known))
    size = image_size or 224
    sized = {"image_size": size} if name.startswith("vit_") else {}
    try:
        encoder = torchvision.models.get_model(name, weights=None, **sized)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise unfit_size(name, size, error) from None
    features = _strip_classifier(encoder, name)
    return Encoder(
        encoder=_enclosed(encoder),
        name=f"torchvision/{name}",
        features=features,
        image_size=size,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    )


def _enclosed(encoder: nn.Module) -> nn.Module:
    """Return an encoder, enclosed where Backbone's own attributes would hide a part of it.

    Backbone's tables are its encoder's: a child called `features` would hide their number.
    """
    own = {"name", "features", "image_size", "mean", "std"}
    return Enclosed(encoder) if own & {name for name, _ in encoder.named_children()} else encoder


def unfit_size(name: str, size: int, reason: Exception | str) -> ValueError:
    """Return the error of an encoder that cannot take an image size."""
    told = " ".join(str(reason).split()) or type(reason).__name__
    return ValueError(
        f"`image_size` must fit the encoder, but {name!r} cannot take {size} pixels: "
        f"{told.rstrip('.')}. Give another `image_size`."
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
