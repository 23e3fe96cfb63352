"""This file reads the user's own tasks in npz files, in either of two key layouts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mergekit_lit.data.archives import Member, npz_keys, npz_member
from mergekit_lit.data.keeping import Stack, fingerprint, stacked
from mergekit_lit.data.splits import Array, Pool
from mergekit_lit.data.tasks import Reader, Task, data_root, exists

_ONE = ("x", "y", "split", "classes")
_TWO = ("x_train", "y_train", "x_test", "y_test", "classes")
_Labels = tuple[Array, Array, tuple[str, ...]]


def npz_task(path: Path, suite: str) -> Task:
    """Return the task in an npz file; its labels are read and checked, its images are not read.

    Raises:
        ValueError: the file is damaged, lacks a key, or its labels or images are wrong.
    """
    members = _members(path)
    _, split, classes = _labels(path, members)
    return Task(
        name=path.stem,
        suite=suite,
        classes=len(classes),
        train=int((split == 0).sum()),
        test=int((split == 1).sum()),
        image_size=_images(path, members, len(split))[0].shape[1],
        kind="your own",
        source=path.name,
        licence="your own",
        where="Put the file back, or make it again.",
        read=_reader(path),
        found=exists(path),
    )


def read_npz(path: Path, *, root: Path | None = None) -> Pool:
    """Read a task from an npz file of either key layout; large images are mapped.

    Keys x, y, split (0 train, 1 test) and classes; or x_train, y_train, x_test, y_test and classes.
    Images are uint8 (N, H, W) or (N, H, W, 1 or 3), labels integers from 0.

    Args:
        path: the file.
        root: folder of the data sets, where large images are kept; None for the default one.

    Raises:
        ValueError: the file is damaged, a pickle, or not as above; one line says how.
    """
    members = _members(path)
    y, split, classes = _labels(path, members)
    content = fingerprint(path)
    images, first = [], 0
    for member in _images(path, members, len(y)):
        stack = Stack(member.shape, member.blocks, y[first : first + member.shape[0]])
        name = f"{path.stem}-{member.key}"
        images.append(
            stacked(stack, folder=data_root(root) / "decoded", name=name, content=content)
        )
        first += member.shape[0]
    if len(images) == 2:
        return Pool(images[0], images[1], classes)
    train, test = (images[0].subset(np.flatnonzero(split == part)) for part in (0, 1))
    return Pool(train, test, classes)


def _reader(path: Path) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (own file)
        return read_npz(path, root=root)

    return read


def _members(path: Path) -> dict[str, Member]:
    """Return the arrays of one of the two layouts, unread."""
    keys = npz_keys(path)
    layout = _ONE if "x" in keys else _TWO
    missing = [key for key in layout if key not in keys]
    if missing:
        raise wrong(
            path,
            f"the keys {', '.join(_ONE)} or {', '.join(_TWO)}, but lacks {', '.join(missing)}",
        )
    return {key: npz_member(path, key) for key in layout}


def _labels(path: Path, members: Mapping[str, Member]) -> _Labels:
    """Return labels, parts (0 train, 1 test) and class names of both layouts alike, checked."""
    named = members["classes"].read()
    if named.ndim != 1:
        raise wrong(path, f"class names (C,), but has {named.shape}")
    if "y" in members:
        y, split = members["y"].read(), members["split"].read()
    else:
        parts = [members[key].read() for key in ("y_train", "y_test")]
        if any(part.ndim != 1 for part in parts):
            raise wrong(path, f"labels (N,), but has {parts[0].shape} and {parts[1].shape}")
        y, split = np.concatenate(parts), np.repeat([0, 1], [len(part) for part in parts])
    check_labels(path, y, split, len(named))
    return y.astype(np.int64), split, tuple(str(name) for name in named)


def _images(path: Path, members: Mapping[str, Member], count: int) -> list[Member]:
    """Return the images of both layouts, unread, checked by their headers."""
    parts = [member for key, member in members.items() if key.startswith("x")]
    for part in parts:
        grey, colour = len(part.shape) == 3, len(part.shape) == 4 and part.shape[-1] in (1, 3)
        if part.dtype != np.uint8 or not (grey or colour) or 0 in part.shape[1:]:
            raise wrong(
                path,
                f"images uint8 (N, H, W) or (N, H, W, 3), but has {part.dtype} {part.shape}",
            )
    if len({part.shape[1:] for part in parts}) > 1:
        raise wrong(
            path,
            f"x_train and x_test of one shape, but they are {parts[0].shape[1:]} "
            f"and {parts[1].shape[1:]}",
        )
    found = sum(part.shape[0] for part in parts)
    if found != count:
        raise wrong(path, f"one label an image, but has {count} for {found}")
    return parts


def check_labels(path: Path, y: Array, split: Array, classes: int) -> None:
    """Check labels and parts of a task.

    Raises:
        ValueError: empty, one class, out of range, of another type or shape.
    """
    if y.dtype.kind not in "iu" or y.ndim != 1 or split.shape != y.shape:
        raise wrong(
            path,
            f"integer labels (N,) and as many split numbers, but has {y.dtype} "
            f"{y.shape} and {split.shape}",
        )
    if not np.isin(split, (0, 1)).all():
        raise wrong(path, "split numbers 0 (train) and 1 (test), but has others")
    if not (split == 0).any() or not (split == 1).any():
        raise wrong(path, "train and test images, but one of them is empty")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise wrong(
            path,
            f"labels in 0..{classes - 1} for {classes} classes, but has {low if low < 0 else high}",
        )
    if len(np.unique(y[split == 0])) < 2:
        raise wrong(path, "train images of at least 2 classes, but has one")


def wrong(path: Path, must: str) -> ValueError:
    """Return the error of a file or folder that must hold something else."""
    return ValueError(f"{str(path)!r} must hold {must}. Make it again.")
