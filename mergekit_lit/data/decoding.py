"""This file decodes images once and keeps them as uint8."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mergekit_lit.core.files import atomic_path
from mergekit_lit.data.keeping import content_key, in_place, kept, list_fingerprint, new_array
from mergekit_lit.data.splits import Array, Images

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

    def content(self, folder: Path) -> str:
        """Return a fingerprint of these very files, named from `folder`, and of their labels."""
        return content_key(list_fingerprint(self.paths, folder), *self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one file.

        Raises:
            ValueError: the file is damaged, no image, or one of floats.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return _rgb(image), int(self.labels[index])
        # A flipped bit makes Pillow raise nearly every class there is.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{str(path)!r} must be a whole image, but is not: {reason.rstrip('.')}. "
                "Replace or remove it."
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


def shown(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, without hidden names; nothing where there is no folder.

    Names that start with a dot are what systems and notebooks leave behind: `.DS_Store`, `._a.png`,
    `.ipynb_checkpoints`.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def decoded(items: Items, *, folder: Path, name: str, content: str, size: int) -> Images:
    """Return images as uint8 (N, size, size, 3), decoded at the first call and then read back.

    Grey images become RGB; others are resized by their shorter side (bicubic, antialiased) and
    cropped at the centre. The arrays are kept as <name>-<size>-<key>.x.npy and .y.npy, where the
    key follows from `content`; files appear whole or not at all. Large ones are mapped.

    Args:
        items: N images.
        folder: where the arrays are kept.
        name: start of the file names.
        content: fingerprint of the images and of their labels: both are kept.
        size: height and width, in pixels.

    Raises:
        ValueError: an image is damaged.
        OSError: `folder` cannot be written.
    """
    key = content_key(content, size, len(items))
    x_path, y_path = (folder / f"{name}-{size}-{key}.{part}.npy" for part in "xy")
    shape = (len(items), size, size, 3)
    x, y = kept(x_path, shape, np.uint8), kept(y_path, shape[:1], np.int64)
    if x is None or y is None:
        with atomic_path(x_path) as temporary:
            labels = _decode_into(temporary, items, size)
        with atomic_path(y_path) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array(file, labels, allow_pickle=False)
        x, y = np.load(x_path, mmap_mode="r"), labels
    return Images(in_place(x), np.array(y))


def square(image: Image.Image, size: int) -> Array:
    """Return an image as uint8 (size, size, 3): shorter side resized, centre cropped."""
    image = _rgb(image)
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image with three channels of 8 bits; transparency is dropped."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range nothing tells")
    if image.mode.startswith("I"):
        # 16 bits: Pillow would cut at 255, and leave nearly all of it white.
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _decode_into(path: Path, items: Items, size: int) -> Array:
    """Write every image into the array file at `path`, and return the labels."""
    x = new_array(path, (len(items), size, size, 3))
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
