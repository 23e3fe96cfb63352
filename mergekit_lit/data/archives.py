"""This file reads npz files that anybody may have made: whole and plain, or refused in one line."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mergekit_lit.data.splits import Array

_BLOCK = 8 * 2**20
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Member:
    """One array of an npz file, of which only the header was read.

    Attributes:
        path: the file.
        key: name of the array.
        shape: its shape.
        dtype: its type; never objects.
        fortran: whether its first axis runs fastest.
        header: bytes before the numbers.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    header: int

    def read(self) -> Array:
        """Return the array, checked against its checksum; it cannot be written to.

        Raises:
            ValueError: the file is damaged.
        """
        with _opened(self.path) as archive:
            content = archive.read(f"{self.key}.npy")
            flat = np.frombuffer(content, self.dtype, offset=self.header)
            return flat.reshape(self.shape, order="F" if self.fortran else "C")

    def blocks(self) -> Iterator[Array]:
        """Yield the array by a few rows at a time, and check it against its checksum at the end.

        Raises:
            ValueError: the file is damaged.
        """
        if self.fortran:
            yield self.read()
            return
        width = max(1, self.dtype.itemsize * math.prod(self.shape[1:]))
        rows = max(1, _BLOCK // width)
        with _opened(self.path) as archive, archive.open(f"{self.key}.npy") as member:
            member.read(self.header)
            for start in range(0, self.shape[0], rows):
                shape = (min(rows, self.shape[0] - start), *self.shape[1:])
                content = member.read(shape[0] * width)
                yield np.frombuffer(content, self.dtype).reshape(shape)
            # zipfile compares the checksum when it meets the end, not before.
            member.read(1)


def npz_keys(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays in an npz file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no npz file, or damaged.
    """
    with _opened(path) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def npz_member(path: Path, key: str) -> Member:
    """Return one array of an npz file, unread.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no npz file, damaged, lacks the array, or holds objects in it.
    """
    with _opened(path) as archive, archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _HEADERS[version](file)
        size = archive.getinfo(f"{key}.npy").file_size
        member = Member(path, key, shape, dtype, fortran, file.tell())
        wanted = member.header + dtype.itemsize * math.prod(shape)
        if not dtype.hasobject and (size != wanted or min(shape, default=0) < 0):
            raise ValueError(f"array {key!r} of shape {shape} must take {wanted} bytes, not {size}")
    if member.dtype.hasobject:
        raise ValueError(
            f"{str(path)!r} must hold plain arrays, but {key!r} holds objects, which only pickle "
            "reads and which can run code when read. Make it again."
        )
    return member


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an npz file, and tell whatever its damage raises inside the block in one line."""
    try:
        file: BinaryIO = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"No file {str(path)!r}.") from None
    with file:
        try:
            if not zipfile.is_zipfile(file):
                raise zipfile.BadZipFile("it is cut off, or no npz at all")
            with zipfile.ZipFile(file) as archive:
                yield archive
        # A flipped bit makes zipfile, zlib and NumPy raise nearly every class there is.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ValueError(
                f"{str(path)!r} must be a whole npz file, but is damaged or of another format: "
                f"{reason.rstrip('.')}. Make it again."
            ) from None
