"""This file reads the user's own tasks: a folder of npz files, or of folders of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mergekit_lit.data.decoding import Files, decoded
from mergekit_lit.data.keeping import fingerprint
from mergekit_lit.data.npz_tasks import check_labels, npz_task, wrong
from mergekit_lit.data.splits import Pool
from mergekit_lit.data.tasks import Reader, Task, exists

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
_LARGEST_SIDE = 224


def folder_tasks(folder: Path) -> tuple[Task, ...]:
    """Return the tasks of a folder, sorted by name; labels are read, images are not.

    Raises:
        ValueError: the folder holds no task, a name twice, or a file that is no task.
    """
    suite = folder.resolve().name
    tasks = [npz_task(path, suite) for path in folder.glob("*.npz")]
    tasks += [image_task(path.parent, suite) for path in folder.glob("*/train") if path.is_dir()]
    if not tasks:
        raise ValueError(
            f"{str(folder)!r} must hold <task>.npz files or folders <task>/train/<class>/ of "
            "images, but holds neither."
        )
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"{str(folder)!r} must hold each task once, but has {min(twice)!r} as npz and folder. "
            "Remove one."
        )
    return tuple(sorted(tasks, key=lambda task: task.name))


def image_task(folder: Path, suite: str) -> Task:
    """Return the task in a folder {train,test}/<class>/ of images; none is decoded.

    Raises:
        ValueError: a part is missing or empty, or test has a class that train lacks.
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
    classes = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    parts = []
    for part in ("train", "test"):
        paths = sorted(
            path
            for path in (folder / part).glob("*/*")
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        )
        unknown = {path.parent.name for path in paths} - set(classes)
        if unknown:
            raise wrong(folder, f"the classes of test in train too, but lacks {min(unknown)!r}")
        parts.append(Files(paths, [classes.index(path.parent.name) for path in paths]))
    y = np.array([*parts[0].labels, *parts[1].labels], dtype=np.int64)
    check_labels(folder, y, np.repeat([0, 1], [len(part) for part in parts]), len(classes))
    return parts[0], parts[1], classes


def _image_reader(folder: Path, suite: str) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (own files)
        train, test, classes = _listed(folder)
        usual = _usual_side(train.paths)
        content = fingerprint(folder)
        parts = [
            decoded(
                files,
                folder=root / "decoded",
                name=f"{suite}-{folder.name}-{part}",
                content=content,
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
