"""This file opens tensors that others wrote: safetensors, shards with an index, torch checkpoints.

Nothing of a file is ever run: torch checkpoints are read by `weights_only`, which takes tensors
and plain containers alone.
"""

import pickle
import pickletools
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lit.core.params import Params
from mergekit_lit.core.shards import INDEX, Shards, open_file
from mergekit_lit.core.tensorfiles import TensorFile

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", *_TORCH_SUFFIXES)
"""What files of tensors are called at their ends."""

# Where training loops put the weights: Lightning, plain torch, timm, DINO.
_WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model", "module", "teacher")

# What torch.save writes is a zip archive, whose tensors can be mapped; until torch 1.6 it was
# pickles, of which the first four tell what follows, and then the bytes of the tensors.
_ZIP = b"PK\x03\x04"
_PICKLES = 4

# What torch's reader of pickles raises on bytes that make no sense.
_DAMAGES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def open_tensors(path: Path) -> Params:
    """Open a file or folder of tensors by what it is; tensors are read when asked for.

    Args:
        path: a `.safetensors` file; a folder with `model.safetensors.index.json` or with one
            `.safetensors` file, as Hugging Face saves models; an index; or a `.pt`, `.pth`, `.bin`
            or Lightning `.ckpt` file.

    Raises:
        FileNotFoundError: there is no such file, or nothing to read in the folder.
        ValueError: it is damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _torch_weights(path)
    return open_file(path)


def _open_folder(folder: Path) -> Params:
    if (folder / INDEX).is_file():
        return Shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{str(folder)!r} must hold {INDEX!r} or one .safetensors file, but holds "
            f"{len(files)} such files. Name the file."
        )
    return TensorFile(files[0])


def _torch_weights(path: Path) -> Params:
    """Return the weights in a file that torch.save wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}.")
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP)) == _ZIP
    try:
        with warnings.catch_warnings():
            # What is wrong is told below, in one line.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not mapped and _is_cut(path):
            raise _damaged(path, "it ends within what describes the tensors") from None
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        reason = reason.partition(" Please use")[0].rstrip(".")
        raise ValueError(
            f"{str(path)!r} must hold tensors and plain values alone, but may hold more: {reason}. "
            "Convert it where you trust it: safetensors.torch.save_file(state_dict, path)."
        ) from None
    except _DAMAGES as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or "it ends too early"
        raise _damaged(path, reason) from None
    return _weights_in(loaded, path)


def _is_cut(path: Path) -> bool:
    """Return whether a file of pickles ends within one of the first, none of which is run."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            if file.tell() == size:
                return False
            try:
                for _ in pickletools.genops(file):
                    pass
            except ValueError:
                return True
    return False


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} must be a whole file of torch.save, but is damaged or of another format: "
        f"{reason}. Copy or make it again."
    )


def _weights_in(loaded: Any, path: Path) -> Params:
    """Return the state dict that a checkpoint is, or holds under one of the usual keys."""
    for key in (None, *_WEIGHTS_KEYS):
        found = loaded if key is None else loaded.get(key) if isinstance(loaded, dict) else None
        if isinstance(found, dict) and found and all(isinstance(t, Tensor) for t in found.values()):
            return dict(sorted(found.items()))
    keys = sorted(map(str, loaded))[:5] if isinstance(loaded, dict) else type(loaded).__name__
    raise ValueError(
        f"{str(path)!r} must be a state dict, or hold one under {', '.join(_WEIGHTS_KEYS)}, but "
        f"holds {keys}."
    )


def match_names(given: Params, wanted: Params, *, source: str) -> tuple[dict[str, str], list[str]]:
    """Find each wanted tensor under its name, or its name behind a prefix common to all.

    Args:
        given: tensors that others wrote, such as `model.encoder.conv1.weight`.
        wanted: tensors by the base's names, such as `conv1.weight`.
        source: what messages call `given`.

    Returns:
        The name in `given` of each wanted tensor; and the names that are left over, such as a
        head's.

    Raises:
        ValueError: not all wanted tensors are there under any one prefix.
    """
    first = min(wanted, default="")
    prefixes = {name.removesuffix(first) for name in given if name.endswith(first)}
    whole = [p for p in prefixes if all(p + name in given for name in wanted)]
    if not whole:
        prefix = max(prefixes | {""}, key=lambda p: (sum(p + n in given for n in wanted), -len(p)))
        missing = sorted(name for name in wanted if prefix + name not in given)
        if any(".lora_" in name for name in given):
            raise ValueError(
                f"{source} must hold whole weights, but holds a LoRA adapter alone. Add it to its "
                "base first, such as by peft's `merge_and_unload`, and save that."
            )
        raise ValueError(
            f"{source} must hold the base's {len(wanted)} tensors, but lacks {len(missing)}, first "
            f"{(prefix + missing[0])!r}. Merge models of one architecture."
        )
    prefix = min(whole, key=lambda p: (len(p), p))
    names = {name: prefix + name for name in wanted}
    return names, sorted(set(given) - set(names.values()))
