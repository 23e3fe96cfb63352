"""This file keeps images on disk as uint8, and maps them into memory when they are large."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_lit.core.files import atomic_path
from mergekit_lit.data.splits import Array, Images, to_rgb

# Above this many bytes an array stays on disk and is mapped into memory.
LARGE = 256 * 2**20
_CHUNK = 512


@dataclass(frozen=True)
class Stack:
    """Images that their source holds as one array, and their labels.

    Attributes:
        shape: (N, H, W), (N, H, W, 1) or (N, H, W, 3).
        blocks: hands out the array anew, in order, some images at a time, uint8.
        y: int64 (N,) labels.
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Array]]
    y: Array

    @classmethod
    def of(cls, x: Array, y: Array) -> "Stack":
        """Return the stack of an array in memory, or of a view of one."""
        starts = range(0, len(x), _CHUNK)
        return cls(x.shape, lambda: (x[start : start + _CHUNK] for start in starts), y)


def stacked(stack: Stack, *, folder: Path, name: str, content: str) -> Images:
    """Return images as uint8 (N, H, W, 3), in memory, or mapped where they are large.

    Large ones are written to `folder` at the first call, as <name>-<key>.x.npy, where the key
    follows from `content`; the file appears whole or not at all.

    Args:
        stack: N images.
        folder: where large ones are kept.
        name: start of the file's name.
        content: fingerprint of the images.

    Raises:
        ValueError: the source is damaged.
        OSError: `folder` cannot be written.
    """
    shape = (*stack.shape[:3], 3)
    if math.prod(shape) <= LARGE:
        return Images(_filled(np.empty(shape, np.uint8), stack), stack.y)
    path = folder / f"{name}-{content_key(content, *shape)}.x.npy"
    x = kept(path, shape, np.uint8)
    if x is None:
        with atomic_path(path) as temporary:
            _filled(new_array(temporary, shape), stack).flush()
        x = np.load(path, mmap_mode="r")
    return Images(x, stack.y)


def fingerprint(*places: Path) -> str:
    """Return a hash over the names, sizes and times of change of files, and of those below folders.

    Links are followed.
    """
    return content_key(
        *(
            list_fingerprint(_paths_below(place), place)
            if place.is_dir()
            else list_fingerprint([place], place.parent)
            for place in places
        )
    )


def list_fingerprint(paths: Iterable[Path], folder: Path) -> str:
    """Return a hash over a list of files: names from `folder`, sizes and times of change, in order.

    A link counts as the file that it leads to, and a link to nothing by its name alone.
    """
    digest = hashlib.sha256()
    for path in paths:
        facts = [str(path.relative_to(folder))]
        if path.exists():
            status = path.stat()
            facts += [str(status.st_size), str(status.st_mtime_ns)]
        digest.update(("\x1f".join(facts) + "\x00").encode(errors="surrogateescape"))
    return digest.hexdigest()


def content_key(*facts: str | int) -> str:
    """Return the part of a kept file's name that tells one content from another."""
    return hashlib.sha256("\x1f".join(map(str, facts)).encode()).hexdigest()[:16]


def kept(path: Path, shape: tuple[int, ...], dtype: type) -> Array | None:
    """Return an array that was kept, mapped; None where it must be made, or made again."""
    if not path.is_file():
        return None
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    # A damaged header makes NumPy raise nearly every class; the array can be made again.
    except Exception:
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def in_place(array: Array) -> Array:
    """Return a mapped array as it is where it is large, and in memory otherwise."""
    return array if array.nbytes > LARGE else np.array(array)


def new_array(path: Path, shape: tuple[int, ...]) -> Any:
    """Return a new uint8 array on disk, to be written to."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _filled(out: Any, stack: Stack) -> Any:
    """Write the images of a stack into an array (N, H, W, 3), and return it."""
    start = 0
    for block in stack.blocks():
        out[start : start + len(block)] = to_rgb(block)
        start += len(block)
    return out


def _paths_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in one order, and the folders that came before by a link.

    No folder is entered twice, so that loops of links end.
    """
    entered = set()
    for parent, below, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in entered:
            below.clear()
            yield Path(parent)
            continue
        entered.add(place)
        below.sort()
        for name in sorted(names):
            yield Path(parent) / name
