"""This file reads the small tasks that ship inside the package."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mergekit_lit.data.archives import npz_keys, npz_member
from mergekit_lit.data.splits import Array, Images, Pool, to_rgb

PACK_FOLDER = Path(__file__).parent / "files"
SIDE = 32

EMBEDDED8 = (
    "mnist",
    "fashion",
    "silhouettes",
    "digits",
    "photo_textures",
    "letters",
    "traffic_signs",
    "clipart",
)
EMBEDDED20 = (
    *EMBEDDED8,
    "hiragana",
    "digits_print",
    "greek",
    "cyrillic",
    "katakana",
    "hebrew",
    "thai",
    "arabic",
    "hand_signs",
    "emoji_nature",
    "emoji_places",
    "emoji_style",
)
SOURCES = (
    "emoji_groups",
    "emoji_symbols",
    "emoji_objects",
    "emoji_faces",
    "emoji_food",
    "flags",
)
# File stem -> its tasks. embedded20 needs both of the first two files.
PACKS = {"embedded8": EMBEDDED8, "embedded20": EMBEDDED20[8:], "sources": SOURCES}


def pack_path(task: str) -> Path:
    """Return the file that holds a shipped task."""
    return next(PACK_FOLDER / f"{pack}.npz" for pack, tasks in PACKS.items() if task in tasks)


@cache
def read_packed(task: str) -> Pool:
    """Read one shipped task, decoded once a process: 32 x 32 RGB, train and test.

    Raises:
        FileNotFoundError: the package was installed without its data files.
        ValueError: they are damaged.
    """
    path = pack_path(task)
    if not path.is_file():
        raise FileNotFoundError(
            f"The package must hold {path.name!r}, but it is missing. Install mergekit-lit again, "
            "or make the file: python experiments/data/pack_embedded.py"
        )
    y, split, classes = (_read(path, f"{task}.{key}") for key in ("y", "split", "classes"))
    if f"{task}.sheet" in npz_keys(path):
        x = _cut(_read(path, f"{task}.sheet").tobytes(), len(y))
    else:
        x = to_rgb(enlarge(_read(path, f"{task}.x")))
    labels = y.astype(np.int64)
    train, test = (_frozen(x[split == part], labels[split == part]) for part in (0, 1))
    return Pool(train, test, tuple(str(name) for name in classes))


def enlarge(x: Array) -> Array:
    """Return grey images at 32 x 32: bicubic for smaller ones, the same array otherwise."""
    if x.shape[1] == SIDE:
        return x
    size = (SIDE, SIDE)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in x]
    )


def _read(path: Path, key: str) -> Array:
    return npz_member(path, key).read()


def _frozen(x: Array, y: Array) -> Images:
    """Return images that cannot be changed in place: every caller shares them."""
    x.setflags(write=False)
    y.setflags(write=False)
    return Images(x, y)


def _cut(sheet: bytes, count: int) -> Array:
    """Return the first `count` images of a square sheet, row by row."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    side = pixels.shape[0] // SIDE
    cells = pixels.reshape(side, SIDE, side, SIDE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(cells.reshape(-1, SIDE, SIDE, 3)[:count])
