"""This file reads the user's own tasks: a folder of npz files, or of folders of images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mergekit_lit.data.decoding import Files, decoded, shown
from mergekit_lit.data.npz_tasks import check_labels, npz_task, wrong
from mergekit_lit.data.splits import Pool
from mergekit_lit.data.tasks import Reader, Task, exists

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
_LARGEST_SIDE = 224


def folder_tasks(folder: Path) -> tuple[Task, ...]:
    """Return the tasks of a folder, sorted by name; labels are read, images are not.

    A task whose files are damaged is listed with its `damage`, and refused when it is read: the
    others are not its business.

    Raises:
        ValueError: the folder holds no task.
    """
    suite = folder.resolve().name
    found: dict[Path, Callable[[Path, str], Task]] = {}
    found |= {path: npz_task for path in shown(folder) if path.suffix == ".npz"}
    found |= {path: image_task for path in shown(folder) if (path / "train").is_dir()}
    if not found:
        raise ValueError(
            f"{str(folder)!r} must hold <task>.npz files or folders <task>/train/<class>/ of "
            "images, but holds neither."
        )
    tasks = {}
    for path, listed in found.items():
        name = path.stem if listed is npz_task else path.name
        if name in tasks:
            why = f"{str(folder)!r} must hold each task once, but has {name!r} as npz and folder."
            tasks[name] = _damaged(name, suite, f"{why} Remove one.")
            continue
        try:
            tasks[name] = listed(path, suite)
        except (ValueError, OSError) as error:
            tasks[name] = _damaged(name, suite, str(error))
    return tuple(tasks[name] for name in sorted(tasks))


def _damaged(name: str, suite: str, why: str) -> Task:
    """Return a task of which only the name is known, and what is wrong with it."""

    def refuse(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (own file)
        raise ValueError(why)

    return Task(
        name=name,
        suite=suite,
        classes=0,
        train=0,
        test=0,
        image_size=0,
        kind="your own",
        source="damaged",
        licence="your own",
        where="Mend it as told, or remove it.",
        read=refuse,
        found=lambda _: True,
        damage=why,
    )


def image_task(folder: Path, suite: str) -> Task:
    """Return the task in a folder {train,test}/<class>/ of images; none is decoded.

    Raises:
        ValueError: a part is missing or empty, or train lacks a class or its images.
    """
    train, test, classes = _listed(folder)
    return Task(
        name=folder.name,
        suite=suite,
        classes=len(classes),
        train=len(train),
        test=len(test),
        image_size=_usual_side(train.paths),
        kind="your own",
        source=folder.name,
        licence="your own",
        where="Put the folder back, or make it again.",
        read=_image_reader(folder, suite),
        found=exists(folder),
    )


def _listed(folder: Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Return the files of both parts with their labels, and the class names, sorted."""
    classes = tuple(path.name for path in shown(folder / "train") if path.is_dir())
    parts = []
    for part in ("train", "test"):
        paths = [
            path
            for below in shown(folder / part)
            for path in shown(below)
            if path.suffix.lower() in _SUFFIXES
        ]
        unknown = {path.parent.name for path in paths} - set(classes)
        if unknown:
            raise wrong(folder, f"the classes of test in train too, but lacks {min(unknown)!r}")
        parts.append(Files(paths, [classes.index(path.parent.name) for path in paths]))
    empty = sorted(set(range(len(classes))) - set(parts[0].labels))
    if empty:
        name = classes[empty[0]]
        raise ValueError(
            f"Task {folder.name!r} must have training images of each class, but has none of "
            f"{name!r}. Put images into {str(folder / 'train' / name)!r}, or remove that folder."
        )
    y = np.array([*parts[0].labels, *parts[1].labels], dtype=np.int64)
    check_labels(folder, y, np.repeat([0, 1], [len(part) for part in parts]), len(classes))
    return parts[0], parts[1], classes


def _image_reader(folder: Path, suite: str) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (own files)
        train, test, classes = _listed(folder)
        usual = _usual_side(train.paths)
        parts = [
            decoded(
                files,
                folder=root / "decoded",
                name=f"{suite}-{folder.name}-{part}",
                content=files.content(folder),
                size=min(size or usual, usual),
            )
            for part, files in (("train", train), ("test", test))
        ]
        return Pool(parts[0], parts[1], classes)

    return read


def _usual_side(paths: Sequence[Path]) -> int:
    """Return the median shorter side of some images, at most 224, from their headers alone."""
    sides = []
    for path in paths[:: max(1, len(paths) // 50)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        # A flipped bit makes Pillow raise nearly every class there is.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise wrong(path, f"an image, but does not: {reason.rstrip('.')}") from None
    return min(_LARGEST_SIDE, sorted(sides)[len(sides) // 2])
