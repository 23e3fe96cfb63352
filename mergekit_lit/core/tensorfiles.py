"""This file reads and writes named tensors: safetensors with facts and checksums in the header."""

import json
import zlib
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_lit.core.files import atomic_path
from mergekit_lit.core.params import Params, tensor_bytes
from mergekit_lit.core.specs import LazyParams, Spec, spec_of

HEADER_KEY = "mergekit_lit"
"""What facts and checksums stand under in a file's metadata."""


Checksums: TypeAlias = dict[str, int]
"""CRC-32 of the bytes of each tensor, by name."""

_FROM_TORCH = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TO_TORCH = {text: dtype for dtype, text in _FROM_TORCH.items()}


def write_tensors(path: Path, tensors: Params, facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts into one safetensors file, atomically and reproducibly.

    The header holds a CRC-32 of each tensor and of the facts, so that a flipped bit is noticed.
    Tensors are asked for one at a time: those of a `Computed` never all take memory at once.

    Raises:
        OSError: the file cannot be written (full disk, read-only folder).
    """
    with atomic_path(path) as temporary:
        write_at(temporary, tensors, facts)


def write_at(path: Path, tensors: Params, facts: Mapping[str, Any]) -> Checksums:
    """Write a file as `write_tensors` does, but straight to its place; return its checksums."""
    specs = {name: spec_of(tensors, name) for name in tensors}
    # safetensors' own order: what is aligned to more bytes first.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    ends = accumulate((specs[name].bytes for name in names), initial=0)
    entries = {
        name: {
            "dtype": _FROM_TORCH[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": list(span),
        }
        for name, span in zip(names, pairwise(ends), strict=True)
    }
    # Sizes are known in advance and checksums are not: room for the longest is left, and filled.
    room = len(_header(entries, facts, dict.fromkeys(names, 2**32 - 1)))
    room += -room % 8
    checksums: Checksums = {}
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in names:
            content = tensor_bytes(_checked(tensors[name], name, specs[name]).contiguous())
            checksums[name] = zlib.crc32(content)
            file.write(content)
        file.seek(0)
        file.write(room.to_bytes(8, "little"))
        file.write(_header(entries, facts, checksums).ljust(room))
    return checksums


def header_of(facts: Mapping[str, Any], checksums: Checksums) -> str:
    """Return the text that keeps facts and checksums in a file; `read_header` reads it."""
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    header = {"facts": text, "facts_crc32": zlib.crc32(text.encode()), "crc32": checksums}
    return json.dumps(header, sort_keys=True)


def read_header(path: Path, text: str) -> tuple[dict[str, Any], Checksums]:
    """Return the facts and checksums that `header_of` wrote into a file.

    Raises:
        ValueError: the text is damaged.
    """
    try:
        header = json.loads(text)
        intact = zlib.crc32(header["facts"].encode()) == header["facts_crc32"]
        checksums, facts = dict(header["crc32"]), json.loads(header["facts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"unreadable header ({error})") from None
    if not intact:
        raise damaged(path, "its header does not match its checksum")
    return facts, checksums


class TensorFile(LazyParams):
    """The tensors of one safetensors file, each read (and checked) when it is asked for.

    Attributes:
        path: the file.
        facts: JSON facts of the header; empty for files that others wrote.
        checksums: CRC-32 of each tensor; empty for files that others wrote.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its header alone.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no safetensors file, is truncated, or its facts were altered.
        """
        self.path = Path(path)
        _refuse_pickle(self.path)
        try:
            # safetensors ships no types.
            self._file: Any = cast("Any", safe_open)(self.path, framework="pt")
            metadata = self._file.metadata() or {}
            super().__init__(dict.fromkeys(sorted(self._file.keys())))
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, str(error)) from None
        self.facts: dict[str, Any] = {}
        self.checksums: Checksums = {}
        if HEADER_KEY in metadata:
            self.facts, self.checksums = read_header(self.path, metadata[HEADER_KEY])
            if self.checksums.keys() != set(self):
                raise damaged(self.path, "its header does not match its checksum")
        self._unread = set(self.checksums)

    def __getitem__(self, name: str) -> Tensor:
        """Map one tensor into memory; what is in it is compared with its checksum the first time.

        Raises:
            KeyError: there is no such tensor.
            ValueError: its bytes do not match the checksum in the header.
        """
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        if name in self._unread:
            if zlib.crc32(tensor_bytes(tensor.contiguous())) != self.checksums[name]:
                raise damaged(self.path, f"tensor {name!r} does not match its checksum")
            self._unread.remove(name)
        return tensor

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape without reading its data.

        Raises:
            ValueError: the number type is none of torch's usual ones.
        """
        header = self._file.get_slice(name)
        dtype = str(header.get_dtype())
        if dtype not in _TO_TORCH:
            known = ", ".join(sorted(_TO_TORCH))
            raise ValueError(
                f"{name!r} of {str(self.path)!r} must be of a known number type, but is of "
                f"{dtype}. Known: {known}."
            )
        return Spec(_TO_TORCH[dtype], tuple(header.get_shape()))

    def under(self, prefix: str) -> "TensorView":
        """Return the tensors whose names start with `prefix`, by their short names, still lazy."""
        return TensorView(self, prefix)


class TensorView(LazyParams):
    """The tensors of a file under one prefix, by short names, read when asked for."""

    def __init__(self, file: Params, prefix: str) -> None:
        names = (name.removeprefix(prefix) for name in file if name.startswith(prefix))
        super().__init__(dict.fromkeys(names))
        self._file, self._prefix = file, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._prefix + name]

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape without reading its data."""
        return spec_of(self._file, self._prefix + name)


def floats(params: Params) -> dict[str, Tensor]:
    """Return half-precision tensors as float32 and the others as they are."""
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in half else t for name, t in params.items()}


def _header(entries: Mapping[str, Any], facts: Mapping[str, Any], checksums: Checksums) -> bytes:
    metadata = {"format": "pt", HEADER_KEY: header_of(facts, checksums)}
    return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()


def _checked(tensor: Tensor, name: str, spec: Spec) -> Tensor:
    """Return the tensor on the CPU, once it is what was promised."""
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"{name!r} must be made of {spec.dtype} and shape {spec.shape}, as announced, but is "
            f"of {tensor.dtype} and {tuple(tensor.shape)}."
        )
    return tensor.detach().cpu()


def _refuse_pickle(path: Path) -> None:
    """Refuse what torch.save or pickle wrote: reading it can run code."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with 8 bytes of length, which may be any, and a JSON object.
    is_json = start[8:] == b"{"
    if not is_json and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise ValueError(
            f"{str(path)!r} must be a safetensors file, but is a pickle, which can run code when "
            "read. Convert it where you trust it: safetensors.torch.save_file(state_dict, path)."
        )


def damaged(path: Path, reason: str) -> ValueError:
    """Return the error for a file that cannot be trusted."""
    return ValueError(
        f"{str(path)!r} must be a whole safetensors file, but is damaged or of another format: "
        f"{reason}. Copy or make it again."
    )
