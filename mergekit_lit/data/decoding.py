"""This file decodes images once and keeps them as uint8, on disk and mapped when large."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mergekit_lit.core.files import atomic_path
from mergekit_lit.data.splits import Array, Images

# Above this many bytes an array stays on disk and is mapped into memory.
LARGE = 256 * 2**20
_CHUNK = 512


class Items(Protocol):
    """Images with labels, decoded one by one when indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Files:
    """Image files and their labels."""

    paths: Sequence[Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one file.

        Raises:
            ValueError: the file is damaged or no image.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), int(self.labels[index])
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{str(path)!r} must be a whole image, but is not: {error}. Replace or remove it."
            ) from None


@dataclass(frozen=True)
class Part:
    """Some of the items, in a given order."""

    items: Items
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one of them."""
        return self.items[int(self.indices[index])]


@dataclass(frozen=True)
class Joined:
    """The items of one sequence, then those of another."""

    first: Items
    second: Items

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one of them."""
        shifted = index - len(self.first)
        return self.first[index] if shifted < 0 else self.second[shifted]


def decoded(items: Items, *, folder: Path, name: str, content: str, size: int) -> Images:
    """Return images as uint8 (N, size, size, 3), decoded at the first call and then read back.

    Grey images become RGB; others are resized by their shorter side (bicubic, antialiased) and
    cropped at the centre. The arrays are kept as <name>-<size>-<key>.x.npy and .y.npy, where the
    key follows from `content`; files appear whole or not at all. Large ones are mapped.

    Args:
        items: N images.
        folder: where the arrays are kept.
        name: start of the file names.
        content: fingerprint of the images.
        size: height and width, in pixels.

    Raises:
        ValueError: an image is damaged.
        OSError: `folder` cannot be written.
    """
    key = hashlib.sha256(f"{content}\x1f{size}\x1f{len(items)}".encode()).hexdigest()[:16]
    x_path, y_path = (folder / f"{name}-{size}-{key}.{part}.npy" for part in "xy")
    if not (x_path.is_file() and y_path.is_file()):
        with atomic_path(x_path) as temporary:
            y = _decode_into(temporary, items, size)
        with atomic_path(y_path) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array(file, y, allow_pickle=False)
    large = x_path.stat().st_size > LARGE
    x = np.load(x_path, mmap_mode="r" if large else None, allow_pickle=False)
    return Images(x, np.load(y_path, allow_pickle=False))


def fingerprint(folder: Path) -> str:
    """Return a hash over the names, sizes and times of change of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(_files_below(folder)):
        status = path.stat()
        entry = f"{path.relative_to(folder)}\x1f{status.st_size}\x1f{status.st_mtime_ns}\x00"
        digest.update(entry.encode())
    return digest.hexdigest()


def square(image: Image.Image, size: int) -> Array:
    """Return an image as uint8 (size, size, 3): shorter side resized, centre cropped."""
    image = image.convert("RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _decode_into(path: Path, items: Items, size: int) -> Array:
    """Write every image into the array file at `path`, and return the labels."""
    shape = (len(items), size, size, 3)
    x: Any = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    y = np.empty(len(items), dtype=np.int64)

    def decode(index: int) -> None:
        image, label = items[index]
        x[index] = square(image, size)
        y[index] = label

    # Pillow decodes without the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _CHUNK):
            for _ in pool.map(decode, range(start, min(start + _CHUNK, len(items)))):
                pass
    x.flush()
    return y


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent) / name
