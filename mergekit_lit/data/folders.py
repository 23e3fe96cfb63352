"""This file reads the user's own tasks: npz files in either key layout, and image folders."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mergekit_lit.data.decoding import Files, decoded, fingerprint
from mergekit_lit.data.splits import Array, Images, Pool, to_rgb
from mergekit_lit.data.tasks import Finder, Reader, Task

_ONE = ("x", "y", "split", "classes")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
_LARGEST_SIDE = 224
_TWO = ("x_train", "y_train", "x_test", "y_test", "classes")


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


def npz_task(path: Path, suite: str) -> Task:
    """Return the task in an npz file; its labels are read and checked.

    Raises:
        ValueError: the file is damaged, lacks a key, or its labels are wrong.
    """
    members = _read(path, images=False)
    _, split, classes = _labels(path, members)
    return Task(
        name=path.stem,
        suite=suite,
        classes=len(classes),
        train=int((split == 0).sum()),
        test=int((split == 1).sum()),
        image_size=_image_size(path),
        kind="your own",
        source=path.name,
        licence="your own",
        where="Put the file back.",
        read=_npz_reader(path),
        found=_exists(path),
    )


def read_npz(path: Path) -> Pool:
    """Read a task from an npz file of either key layout.

    Keys x, y, split (0 train, 1 test) and classes; or x_train, y_train, x_test, y_test and classes.
    Images are uint8 (N, H, W) or (N, H, W, 1 or 3), labels integers from 0.

    Raises:
        ValueError: the file is damaged, a pickle, or not as above; one line says how.
    """
    members = _read(path, images=True)
    y, split, classes = _labels(path, members)
    one = "x" in members
    parts = [members["x"]] if one else [members["x_train"], members["x_test"]]
    for part in parts:
        _check_images(path, part)
    if not one and parts[0].shape[1:] != parts[1].shape[1:]:
        raise _wrong(
            path,
            f"x_train and x_test of one shape, but they are {parts[0].shape[1:]} "
            f"and {parts[1].shape[1:]}",
        )
    if sum(map(len, parts)) != len(y):
        raise _wrong(path, f"one label an image, but has {len(y)} for {sum(map(len, parts))}")
    x = to_rgb(parts[0] if one else np.concatenate(parts))
    train, test = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
    return Pool(Images(x[train], y[train]), Images(x[test], y[test]), classes)


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
        where="Put the folder back.",
        read=_image_reader(folder, suite),
        found=_exists(folder),
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
            raise _wrong(folder, f"the classes of test in train too, but lacks {min(unknown)!r}")
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
        except OSError as error:
            raise _wrong(path, f"an image, but does not: {error}") from None
    return min(_LARGEST_SIDE, sorted(sides)[len(sides) // 2])


def _npz_reader(path: Path) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (own file)
        return read_npz(path)

    return read


def _exists(path: Path) -> Finder:
    def found(root: Path) -> bool:  # noqa: ARG001 (own file)
        return path.exists()

    return found


def _read(path: Path, *, images: bool) -> dict[str, Array]:
    """Return the members of one of the two layouts, without the images unless asked for."""
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is cut off, or no npz at all")
        with np.load(path, allow_pickle=False) as file:
            layout = _ONE if "x" in file.files else _TWO
            missing = [key for key in layout if key not in file.files]
            if missing:
                raise _wrong(
                    path,
                    f"the keys {', '.join(_ONE)} or {', '.join(_TWO)}, but lacks "
                    f"{', '.join(missing)}",
                )
            return {key: file[key] for key in layout if images or not key.startswith("x")}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} must be a whole npz file, but is damaged or of another format: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Make it again."
        ) from None
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise _wrong(
                path,
                "plain arrays, but holds objects, which only pickle reads and "
                "which can run code when read",
            ) from None
        raise


def _labels(path: Path, members: Mapping[str, Array]) -> tuple[Array, Array, tuple[str, ...]]:
    """Return labels, parts (0 train, 1 test) and class names of both layouts alike, checked."""
    if "y" in members:
        y, split = members["y"], members["split"]
    else:
        y = np.concatenate([members["y_train"], members["y_test"]])
        split = np.repeat([0, 1], [len(members["y_train"]), len(members["y_test"])])
    classes = tuple(str(name) for name in members["classes"])
    check_labels(path, y, split, len(classes))
    return y.astype(np.int64), split, classes


def check_labels(path: Path, y: Array, split: Array, classes: int) -> None:
    """Check labels and parts of a task.

    Raises:
        ValueError: empty, one class, out of range, of another type or shape.
    """
    if y.dtype.kind not in "iu" or y.ndim != 1 or split.shape != y.shape:
        raise _wrong(
            path,
            f"integer labels (N,) and as many split numbers, but has {y.dtype} "
            f"{y.shape} and {split.shape}",
        )
    if not np.isin(split, (0, 1)).all():
        raise _wrong(path, "split numbers 0 (train) and 1 (test), but has others")
    if not (split == 0).any() or not (split == 1).any():
        raise _wrong(path, "train and test images, but one of them is empty")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise _wrong(
            path,
            f"labels in 0..{classes - 1} for {classes} classes, but has {low if low < 0 else high}",
        )
    if len(np.unique(y[split == 0])) < 2:
        raise _wrong(path, "train images of at least 2 classes, but has one")


def _check_images(path: Path, x: Array) -> None:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)):
        raise _wrong(path, f"images uint8 (N, H, W) or (N, H, W, 3), but has {x.dtype} {x.shape}")


def _image_size(path: Path) -> int:
    """Return the height of the images, read from the header of their member alone."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        with archive.open("x.npy" if "x.npy" in names else "x_train.npy") as member:
            np.lib.format.read_magic(member)
            shape: tuple[int, ...] = np.lib.format.read_array_header_1_0(member)[0]
    return shape[1] if len(shape) > 1 else 0


def _wrong(path: Path, must: str) -> ValueError:
    return ValueError(f"{str(path)!r} must hold {must}. Make it again.")
