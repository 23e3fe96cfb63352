"""This file reads and writes named tensors: safetensors with facts and checksums in the header."""

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lit.core.files import atomic_path
from mergekit_lit.core.params import Params, tensor_bytes

# One key: safetensors writes several metadata keys in an order that differs between processes.
_HEADER_KEY = "mergekit_lit"


def write_tensors(path: Path, tensors: Params, facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts into one safetensors file, atomically and reproducibly.

    The header holds a CRC-32 of each tensor and of the facts, so that a flipped bit is noticed.

    Raises:
        OSError: the file cannot be written (full disk, read-only folder).
    """
    plain = _separate(tensors)
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    header = {
        "facts": text,
        "facts_crc32": zlib.crc32(text.encode()),
        "crc32": {name: zlib.crc32(tensor_bytes(plain[name])) for name in sorted(plain)},
    }
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata={_HEADER_KEY: json.dumps(header, sort_keys=True)})
        except SafetensorError as error:
            raise _system_error(error) from error


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, each read (and checked) when it is asked for.

    Attributes:
        path: the file.
        facts: JSON facts of the header; empty for files that others wrote.
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
            self._names = tuple(sorted(self._file.keys()))
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, str(error)) from None
        self._checksums: dict[str, int] = {}  # of the tensors that were not read yet
        self.facts: dict[str, Any] = {}
        if _HEADER_KEY in metadata:
            self._read_header(metadata[_HEADER_KEY])

    def _read_header(self, text: str) -> None:
        try:
            header = json.loads(text)
            intact = zlib.crc32(header["facts"].encode()) == header["facts_crc32"]
            self._checksums = dict(header["crc32"])
            self.facts = json.loads(header["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path, f"unreadable header ({error})") from None
        if not intact or set(self._checksums) != set(self._names):
            raise _damaged(self.path, "its header does not match its checksum")

    def __getitem__(self, name: str) -> Tensor:
        """Map one tensor into memory; what is in it is compared with its checksum the first time.

        Raises:
            KeyError: there is no such tensor.
            ValueError: its bytes do not match the checksum in the header.
        """
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        expected = self._checksums.get(name)
        if expected is not None and zlib.crc32(tensor_bytes(tensor.contiguous())) != expected:
            raise _damaged(self.path, f"tensor {name!r} does not match its checksum")
        self._checksums.pop(name, None)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return tuple(self._file.get_slice(name).get_shape())

    def is_floating_point(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers, without reading its data."""
        return str(self._file.get_slice(name).get_dtype()).startswith(("F", "BF"))

    def under(self, prefix: str) -> "TensorView":
        """Return the tensors whose names start with `prefix`, by their short names, still lazy."""
        return TensorView(self, prefix)


class TensorView(Mapping[str, Tensor]):
    """The tensors of a file under one prefix, by short names, read when asked for."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix
        self._names = tuple(name.removeprefix(prefix) for name in file if name.startswith(prefix))

    def __getitem__(self, name: str) -> Tensor:
        return self._file[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._file.shape(self._prefix + name)

    def is_floating_point(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers, without reading its data."""
        return self._file.is_floating_point(self._prefix + name)


def floats(params: Params) -> dict[str, Tensor]:
    """Return half-precision tensors as float32 and the others as they are."""
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in half else t for name, t in params.items()}


def _separate(tensors: Params) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory, which safetensors would refuse."""
    separate: dict[str, Tensor] = {}
    owned: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if place in owned else plain
        owned.add(place)
    return separate


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


def _system_error(error: SafetensorError) -> OSError:
    """Return the operating system's error, which safetensors gives as text, such as a full disk."""
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        return OSError(errno.EIO, str(error))
    return OSError(int(code.group(1)), os.strerror(int(code.group(1))))


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} must be a whole safetensors file, but is damaged or of another format: "
        f"{reason}. Copy or make it again."
    )
