"""This file is the permutation symmetries of ResNets and ViTs: which axes permute together.

The name of an axis is that of the permutation that acts on it. `3*heads*32` is an axis that reads
as 3 x heads x 32, of which the permutation acts on the middle factor. The permutation `features`
acts on the encoder's output, and so on the second axis of every head's weight.
"""

import re
from collections.abc import Iterable

import torchvision
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mergekit_lit.models.architectures import SmallResNet

Axes = tuple[str | None, ...]
_BLOCK = re.compile(r"(layer\d+)\.(\d+)\.(.+)")
_UNCUT = re.compile(r"(conv|bn)(\d)\.\w+|downsample\.\d\.\w+")


def axes_of(module: nn.Module) -> dict[str, Axes]:
    """Return the permutation of each axis of each tensor; empty where the symmetries are unknown.

    Source: Ainsworth et al. 2022, arXiv:2209.04836, section 3.
    Differs: ViTs too, whose heads, hidden units and residual stream permute.
    """
    encoder = getattr(module, "_encoder", module)
    tensors = encoder.state_dict(keep_vars=True)
    if isinstance(encoder, (SmallResNet, ResNet, torchvision.models.ResNet)):
        return _resnet_axes(tensors)
    if isinstance(encoder, (VisionTransformer, torchvision.models.VisionTransformer)):
        return _vit_axes(tensors, _heads(encoder))
    return {}


def _resnet_axes(tensors: dict[str, Tensor]) -> dict[str, Axes]:
    """Return the axes of basic and bottleneck blocks; empty for stems or blocks of other kinds."""
    streams = _streams(tensors)
    convolutions = _convolutions(tensors)
    axes: dict[str, Axes] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            if name.split(".")[0] not in ("conv1", "bn1") or name.count(".") > 1:
                return {}
            axes[name] = _layer_axes(tensor, None, streams["stem"])
            continue
        stage, index, rest = match.groups()
        layer = _UNCUT.fullmatch(rest)
        block = f"{stage}.{index}"
        if layer is None or (tensor.dim() == 4 and _is_grouped(tensor, name, tensors)):
            return {}
        before, after = streams[f"{block}:in"], streams[f"{block}:out"]
        if layer[2]:
            number = int(layer[2])
            before = before if number == 1 else f"{block}.{number - 1}"
            after = after if number == convolutions[block] else f"{block}.{number}"
        axes[name] = _layer_axes(tensor, before, after)
    return axes


def _streams(tensors: Iterable[str]) -> dict[str, str]:
    """Return the residual stream of the stem, and before and after each block.

    A block with a projection on its shortcut starts a new stream; the last is `features`.
    """
    names = list(tensors)
    blocks = list(dict.fromkeys(m[1] + "." + m[2] for m in map(_BLOCK.fullmatch, names) if m))
    streams = {"stem": "stem"}
    current = "stem"
    for block in blocks:
        streams[f"{block}:in"] = current
        if any(name.startswith(f"{block}.downsample") for name in names):
            current = block.split(".")[0]
        streams[f"{block}:out"] = current
    return {key: "features" if s == current else s for key, s in streams.items()}


def _convolutions(tensors: Iterable[str]) -> dict[str, int]:
    """Return how many convolutions lie on the main path of each block."""
    counts: dict[str, int] = {}
    for name in tensors:
        match = re.fullmatch(r"(layer\d+\.\d+)\.conv(\d)\.weight", name)
        if match:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]))
    return counts


def _is_grouped(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> bool:
    """Return whether a convolution reads fewer channels than the one before it makes."""
    block, layer, _ = name.rsplit(".", 2)
    before = tensors.get(f"{block}.conv{int(layer[4:]) - 1}.weight") if "conv" in layer else None
    return before is not None and before.shape[0] != tensor.shape[1]


def _layer_axes(tensor: Tensor, before: str | None, after: str | None) -> Axes:
    """Return the axes of a weight, (after, before, None, None), or of a vector, (after,)."""
    if tensor.dim() == 0:
        return ()
    return (after, before, None, None)[: tensor.dim()] if tensor.dim() > 1 else (after,)


def _heads(encoder: nn.Module) -> dict[str, int]:
    """Return the number of attention heads of each block."""
    heads = {}
    for name, module in encoder.named_modules():
        block, _, layer = name.rpartition(".")
        if layer in ("attn", "self_attention"):
            heads[block] = int(getattr(module, "num_heads", 1))
    return heads


def _vit_axes(tensors: dict[str, Tensor], heads: dict[str, int]) -> dict[str, Axes]:
    """Return the axes of plain ViT blocks; empty for gated MLPs and other kinds."""
    axes: dict[str, Axes] = {}
    for name, tensor in tensors.items():
        block = next((b for b in heads if name.startswith(f"{b}.")), "")
        labels = _vit_labels(name.removeprefix(f"{block}."), tensor, in_block=bool(block))
        if labels is None:
            return {}
        sizes = zip(labels, tensor.shape, strict=True)
        axes[name] = tuple(_spell(x, n, block, heads.get(block, 0)) for x, n in sizes)
    return axes


def _vit_labels(leaf: str, tensor: Tensor, *, in_block: bool) -> Axes | None:
    """Return what each axis of a ViT's tensor is, or None for an unknown tensor."""
    if re.fullmatch(r"cls_token|class_token|reg_token|(encoder\.)?pos_embed(ding)?", leaf):
        return (*[None] * (tensor.dim() - 1), "features")
    for pattern, labels in _VIT_BLOCK if in_block else _VIT_OUTSIDE:
        if re.fullmatch(pattern, leaf):
            return labels
    return None


def _spell(label: str | None, size: int, block: str, heads: int) -> str | None:
    """Return the name of an axis: its permutation, with the factors around it."""
    if label == "qkv":
        return f"3*{block}.heads*{size // (3 * heads)}"
    if label == "heads":
        return f"{block}.heads*{size // heads}"
    return f"{block}.{label}" if label == "hidden" else label


_VIT_OUTSIDE: tuple[tuple[str, Axes], ...] = (
    (r"(patch_embed\.proj|conv_proj)\.weight", ("features", None, None, None)),
    (r"(patch_embed\.proj|conv_proj)\.bias", ("features",)),
    (r"(encoder\.ln|norm|norm_pre|fc_norm)\.\w+", ("features",)),
)
_VIT_BLOCK: tuple[tuple[str, Axes], ...] = (
    (r"(norm[12]|ln_[12])\.\w+|ls[12]\.gamma", ("features",)),
    (r"attn\.[qk]_norm\.\w+", (None,)),
    (r"(attn\.qkv\.|self_attention\.in_proj_)weight", ("qkv", "features")),
    (r"(attn\.qkv\.|self_attention\.in_proj_)bias", ("qkv",)),
    (r"(attn\.proj|self_attention\.out_proj)\.weight", ("features", "heads")),
    (r"(attn\.proj|self_attention\.out_proj)\.bias", ("features",)),
    (r"mlp\.(fc1|0)\.weight", ("hidden", "features")),
    (r"mlp\.(fc1|0)\.bias", ("hidden",)),
    (r"mlp\.(fc2|3)\.weight", ("features", "hidden")),
    (r"mlp\.(fc2|3)\.bias", ("features",)),
)
