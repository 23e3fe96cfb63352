"""This file opens the 20 vision tasks where their sources put them, each with its own traps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mergekit_lit.data import class_names
from mergekit_lit.data.decoding import Files, Items, Joined, Part, shown
from mergekit_lit.data.keeping import Stack, content_key, fingerprint
from mergekit_lit.data.splits import Array, proportional_order

# EuroSAT has no official split: a tenth of each class to test, a tenth to val, by this seed.
_EUROSAT_SEED = 0


@dataclass(frozen=True)
class Opened:
    """A task as its source has it: stacks of images, or images to be decoded.

    Attributes:
        train: the training pool.
        test: the test set.
        classes: C class names.
        val: a validation set that is fixed; None where it is carved from train.
        content: fingerprint of the files, and of labels that stand outside them.
    """

    train: Stack | Items
    test: Stack | Items
    classes: tuple[str, ...]
    val: Stack | Items | None = None
    content: str = ""


Opener = Callable[[Path, bool], Opened]


def open_torchvision(
    name: str, folder: str, *, train: Mapping[str, Any], test: Mapping[str, Any]
) -> Opener:
    """Return an opener for a torchvision set whose images are files, with official splits.

    Args:
        name: the class in `torchvision.datasets`.
        folder: its folder under the root, for the fingerprint.
        train: arguments that choose the training pool.
        test: arguments that choose the test set.
    """

    def opened(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' one signature)
        parts = [_torchvision(name, root, download=download, **a) for a in (train, test)]
        names = _classes(parts[0]) or {"GTSRB": class_names.GTSRB, "PCAM": class_names.PCAM}[name]
        return Opened(parts[0], parts[1], names, content=fingerprint(root / folder))

    return opened


def open_arrays(name: str, *places: str, **choices: Any) -> Opener:
    """Return an opener for a torchvision set that holds its images as one array.

    Args:
        name: the class in `torchvision.datasets`.
        places: its files and folders under the root, for the fingerprint.
        choices: further arguments, such as EMNIST's split.
    """

    def opened(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' one signature)
        by_split = name in ("SVHN", "STL10")
        parts = [
            _torchvision(
                name,
                root,
                download=download,
                **choices,
                **({"split": part} if by_split else {"train": part == "train"}),
            )
            for part in ("train", "test")
        ]
        names = _classes(parts[0]) or class_names.DIGITS
        # The labels of EMNIST's letters start at 1: class 0 is called N/A and has no image.
        first = int(choices.get("split") == "letters")
        train, test = (_stack(part, first, upright=name == "EMNIST") for part in parts)
        content = fingerprint(*(root / place for place in places))
        return Opened(train, test, tuple(text for text in names if text != "N/A"), content=content)

    return opened


def open_dtd(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' one signature)
    """Open DTD, partition 1: the training pool is its train and val parts, as in the papers."""
    train, val, test = (
        _torchvision("DTD", root, download=download, split=part, partition=1)
        for part in ("train", "val", "test")
    )
    content = fingerprint(root / "dtd")
    return Opened(Joined(train, val), test, _classes(train), content=content)


def open_eurosat(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' signature)
    """Open EuroSAT: 27,000 images without a split, here 21,600 + 2,700 val + 2,700 test, seeded."""
    whole = _torchvision("EuroSAT", root, download=download)
    labels = np.asarray(whole.targets)
    order = proportional_order(labels, _EUROSAT_SEED, "eurosat")
    tenth = len(labels) // 10
    parts = order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth]
    train, val, test = (Part(whole, np.sort(part).tolist()) for part in parts)
    return Opened(
        train, test, _classes(whole), val=val, content=fingerprint(root / "eurosat" / "2750")
    )


def open_sun397(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' signature)
    """Open SUN397 by its official lists Training_01.txt and Testing_01.txt (partition 1).

    Raises:
        FileNotFoundError: a list is missing.
    """
    folder = root / "SUN397"
    if download and not folder.is_dir():
        _torchvision("SUN397", root, download=True)
    paths = (folder / "ClassName.txt").read_text(encoding="utf-8").split()
    label = {path: index for index, path in enumerate(paths)}

    def listed(name: str) -> Files:
        lines = _sun397_list(folder, name).read_text(encoding="utf-8").split()
        files = [folder / line.lstrip("/") for line in lines]
        return Files(files, [label[line.rpartition("/")[0]] for line in lines])

    # /a/abbey -> abbey, /b/bar/outdoor -> bar/outdoor
    names = tuple(path.split("/", 2)[2] for path in paths)
    train, test = listed("Training_01.txt"), listed("Testing_01.txt")
    return _opened(train, test, names, folder)


def open_cars(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' one signature)
    """Open Stanford Cars from its official files, or as Hugging Face has it."""
    if (root / "stanford_cars").is_dir():
        train, test = (_torchvision("StanfordCars", root, split=s) for s in ("train", "test"))
        return Opened(train, test, _classes(train), content=fingerprint(root / "stanford_cars"))
    return _hugging_face("tanganke/stanford_cars", root / "huggingface" / "cars", download=download)


def open_resisc45(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' signature)
    """Open RESISC45 from folder NWPU-RESISC45 and its lists, or as Hugging Face has it."""
    folder = root / "resisc45"
    if folder.is_dir():

        def listed(part: str) -> Files:
            names = (folder / f"resisc45-{part}.txt").read_text(encoding="utf-8").split()
            labels = [class_names.RESISC45.index(name.rpartition("_")[0]) for name in names]
            images = folder / "NWPU-RESISC45"
            return Files([images / name.rpartition("_")[0] / name for name in names], labels)

        train, test = listed("train"), listed("test")
        return _opened(train, test, class_names.RESISC45, folder)
    path = root / "huggingface" / "resisc45"
    return _hugging_face("tanganke/resisc45", path, download=download, names=class_names.RESISC45)


def open_fer2013(root: Path, download: bool) -> Opened:  # noqa: FBT001 (the openers' signature)
    """Open FER2013 from the official csv, from folders train/<emotion>/, or from Hugging Face.

    Labels follow the csv: neutral is the last.
    """
    folder = root / "fer2013"
    if (folder / "train").is_dir():
        return _fer2013_folders(folder)
    if folder.is_dir():
        train, test = (_torchvision("FER2013", root, split=s) for s in ("train", "test"))
        if len(test) and test[0][1] is None:
            raise ValueError(
                f"{str(folder)!r} must hold labelled test images, but Kaggle's test.csv has no "
                "labels. Put fer2013.csv or icml_face_data.csv there."
            )
        return Opened(train, test, class_names.FER2013, content=fingerprint(folder))
    path = root / "huggingface" / "fer2013"
    return _hugging_face(
        "clip-benchmark/wds_fer2013",
        path,
        download=download,
        names=class_names.FER2013,
        unnamed=class_names.FER2013_FOLDERS,
    )


def _fer2013_folders(folder: Path) -> Opened:
    def listed(part: str) -> Files:
        paths = [p for below in shown(folder / part) for p in shown(below) if p.is_file()]
        return Files(paths, [_index(p.parent.name, class_names.FER2013) for p in paths])

    return _opened(listed("train"), listed("test"), class_names.FER2013, folder)


def _opened(train: Files, test: Files, classes: tuple[str, ...], folder: Path) -> Opened:
    """Return a task whose files we list ourselves, known by these very files."""
    content = content_key(train.content(folder), test.content(folder))
    return Opened(train, test, classes, content=content)


@dataclass(frozen=True)
class _Rows:
    """Rows of a Hugging Face data set as images with our labels."""

    rows: Any
    image: str
    label: str
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[int(index)]
        return row[self.image], self.labels[int(row[self.label])]


def _hugging_face(
    repository: str,
    path: Path,
    *,
    download: bool,
    names: tuple[str, ...] | None = None,
    unnamed: tuple[str, ...] = (),
) -> Opened:
    """Open a data set that was saved at `path`; its labels are renumbered to `names`.

    Args:
        repository: where it is fetched from.
        path: folder that `save_to_disk` wrote.
        download: whether it may be fetched.
        names: our class names, in our order; None takes the data set's.
        unnamed: what the data set's labels mean where it does not say so itself.
    """
    datasets = _datasets()
    if download and not path.is_dir():
        parts = datasets.load_dataset(repository, split=["train", "test"])
        partial = path.with_name(f"{path.name}.partial")
        datasets.DatasetDict(train=parts[0], test=parts[1]).save_to_disk(str(partial))
        partial.rename(path)
    saved = datasets.load_from_disk(str(path))
    features = saved["train"].features
    image = next(key for key, kind in features.items() if isinstance(kind, datasets.Image))
    label = next(key for key in ("label", "labels", "cls") if key in features)
    theirs = tuple(getattr(features[label], "names", None) or unnamed)
    ours = names or theirs
    labels = tuple(_index(name, ours) for name in theirs)
    train, test = (_Rows(saved[part], image, label, labels) for part in ("train", "test"))
    return Opened(train, test, ours, content=fingerprint(path))


def _index(name: str, names: tuple[str, ...]) -> int:
    """Return the index of a class name that may be spelt otherwise.

    Raises:
        ValueError: it is none of them.
    """
    if name in names:
        return names.index(name)
    spelt = name.lower().replace(" ", "_")
    spelt = class_names.FER2013_SPELLINGS.get(spelt, spelt)
    if spelt not in names:
        raise ValueError(f"A class must be one of {', '.join(names)}, but is {name!r}.")
    return names.index(spelt)


def _torchvision(name: str, root: Path, **choices: Any) -> Any:
    """Return a torchvision data set; nothing is fetched unless `choices` say so."""
    from torchvision import datasets

    if not choices.get("download"):
        choices.pop("download", None)
    root.mkdir(parents=True, exist_ok=True)
    return getattr(datasets, name)(str(root), **choices)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "Reading this task needs the extra: pip install 'mergekit-lit[vision]'."
        ) from None
    return datasets


def _classes(part: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in getattr(part, "classes", ()))


def _stack(part: Any, first: int, *, upright: bool) -> Stack:
    """Return a torchvision set's own array, and its labels counted from 0.

    Args:
        part: the set.
        first: its smallest label.
        upright: whether its images are transposed, as EMNIST's are.
    """
    x: Array = np.asarray(part.data)
    if x.ndim == 4 and x.shape[1] == 3 and x.shape[-1] != 3:
        x = x.transpose(0, 2, 3, 1)
    labels = part.targets if hasattr(part, "targets") else part.labels
    x = x.swapaxes(1, 2) if upright else x
    return Stack.of(x, np.asarray(labels, dtype=np.int64) - first)


def _sun397_list(folder: Path, name: str) -> Path:
    """Return where an official list lies: beside the images, in Partitions/, or a level up."""
    for path in (folder / name, folder / "Partitions" / name, folder.parent / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{str(folder)!r} must hold {name!r}, but does not. Unpack the official Partitions.zip "
        "of SUN397 there."
    )
