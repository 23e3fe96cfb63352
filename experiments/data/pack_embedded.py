"""Pack folders of <task>.npz into the files that ship inside the package.

A pack is an npz file that `numpy.load` opens without pickle. Per task it holds

    <task>.x        uint8 (N, h, w) grey images, h x w = 32 x 32 or 8 x 8 (enlarged when read), or
    <task>.sheet    the bytes of one lossless WebP sheet of 32 x 32 colour images, row by row
    <task>.y        uint16 labels
    <task>.split    0 train, 1 test
    <task>.classes  class names

It writes hashes.json beside the packs, from which `mergekit-lit doctor` knows the images again.

Members are LZMA-compressed inside the zip, which takes a quarter less than Deflate for glyphs.

    python experiments/data/pack_embedded.py --material FOLDER

FOLDER holds <task>.npz and sources/<task>.npz with the keys x (uint8, N x 32 x 32, or x 3 if in
colour), y, split (0 train, 1 test) and classes.
"""

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mergekit_lit.core.files import atomic_path, write_json
from mergekit_lit.data.listing import HASHES, pool_hashes
from mergekit_lit.data.packs import PACK_FOLDER, PACKS, enlarge, read_packed

# Coloured noise does not compress: fewer images keep the file under 12 MB.
KEPT = {"digits_print": (1200, 300)}
# scikit-learn's digits are 8 x 8; the 32 x 32 images are their exact bicubic enlargement.
SMALL = {"digits": 8}


def main() -> None:
    """Write every pack and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--material", type=Path, required=True, help="folder of <task>.npz")
    parser.add_argument("--out", type=Path, default=PACK_FOLDER, help="where the packs go")
    arguments = parser.parse_args()
    for pack, tasks in PACKS.items():
        folder = arguments.material / ("sources" if pack == "sources" else "")
        members: dict[str, np.ndarray[Any, Any]] = {}
        for task in tasks:
            members |= pack_task(task, folder / f"{task}.npz")
        path = arguments.out / f"{pack}.npz"
        write_pack(path, members)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(tasks)} tasks")
    if arguments.out == PACK_FOLDER:
        names = [task for tasks in PACKS.values() for task in tasks]
        write_json(HASHES, {name: pool_hashes(name, read_packed(name)) for name in names})


def pack_task(task: str, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the members of one task."""
    with np.load(path, allow_pickle=False) as file:
        x, y, split, classes = (file[key] for key in ("x", "y", "split", "classes"))
    if task in KEPT:
        rows = np.concatenate([np.flatnonzero(split == s)[:k] for s, k in enumerate(KEPT[task])])
        x, y, split = x[rows], y[rows], split[rows]
    members = {"y": y.astype(np.uint16), "split": split.astype(np.int8), "classes": classes}
    if x.ndim == 3:
        members["x"] = shrink(x, SMALL[task]) if task in SMALL else x
    else:
        members["sheet"] = np.frombuffer(sheet_bytes(x), dtype=np.uint8)
    return {f"{task}.{key}": value for key, value in members.items()}


def shrink(x: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Return the small images whose bicubic enlargement is exactly `x`.

    Raises:
        ValueError: `x` is no such enlargement.
    """
    from sklearn.datasets import load_digits

    small = (load_digits().images * 255 / 16).clip(0, 255).astype(np.uint8)
    large = {image.tobytes(): row for row, image in enumerate(enlarge(small))}
    if size != small.shape[1] or any(image.tobytes() not in large for image in x):
        raise ValueError("The images must be enlarged scikit-learn digits, but are others.")
    return small[[large[image.tobytes()] for image in x]]


def sheet_bytes(x: np.ndarray[Any, Any]) -> bytes:
    """Return one lossless WebP sheet of the images, row by row, padded with black."""
    side = int(np.ceil(len(x) ** 0.5))
    _, h, w, _ = x.shape
    cells = np.zeros((side * side, h, w, 3), dtype=np.uint8)
    cells[: len(x)] = x
    sheet = cells.reshape(side, side, h, w, 3).swapaxes(1, 2).reshape(side * h, side * w, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=80, method=4, exact=True)
    return buffer.getvalue()


def write_pack(path: Path, members: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write an npz whose members are LZMA-compressed; the same members give the same bytes."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, value in members.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, value, allow_pickle=False)
            stored = name.endswith(".sheet")
            entry = zipfile.ZipInfo(f"{name}.npy")
            method = zipfile.ZIP_STORED if stored else zipfile.ZIP_LZMA
            archive.writestr(entry, buffer.getvalue(), compress_type=method)


if __name__ == "__main__":
    main()
