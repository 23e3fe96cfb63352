"""This file is the suites of the papers: vision8, vision14, vision20, paper8 and paper20."""

from pathlib import Path
from typing import NamedTuple

from mergekit_lit.core.registry import SUITES
from mergekit_lit.data.decoding import Items, decoded
from mergekit_lit.data.keeping import Stack, stacked
from mergekit_lit.data.sources import (
    Opened,
    Opener,
    open_arrays,
    open_cars,
    open_dtd,
    open_eurosat,
    open_fer2013,
    open_resisc45,
    open_sun397,
    open_torchvision,
)
from mergekit_lit.data.splits import Images, Pool
from mergekit_lit.data.suites import Suite
from mergekit_lit.data.tasks import Finder, Reader, Task


class _Facts(NamedTuple):
    """What is told of a task, how it is opened, and by which paths it is found."""

    opener: Opener
    needs: tuple[str, ...]
    classes: int
    train: int
    test: int
    image_size: int
    kind: str
    licence: str
    # Other places that serve as well as `needs`.
    instead: tuple[str, ...] = ()
    manual: str = ""


def _official(name: str, folder: str, train: str = "train") -> Opener:
    return open_torchvision(name, folder, train={"split": train}, test={"split": "test"})


_CARS = "Put the official files into stanford_cars/ (devkit, cars_train, cars_test)"
_SUN = "Put the images and the lists of Partitions.zip into SUN397/."
_RESISC = "Put NWPU-RESISC45/ and resisc45-train.txt, resisc45-test.txt into resisc45/"
_FER = "Put fer2013.csv, or folders train/<emotion>/ and test/<emotion>/, into fer2013/"
_NONE = "none stated"
_RESEARCH = "research only"

# Sizes as published: pool before val is carved, and test. Variable images are kept at 224 pixels,
# traffic signs, most of which are smaller than that, at 64.
_FACTS = {
    "cars": _Facts(
        open_cars,
        ("stanford_cars/devkit",),
        *(196, 8144, 8041, 224, "photographs", _RESEARCH),
        instead=("huggingface/cars",),
        manual=_CARS,
    ),
    "dtd": _Facts(open_dtd, ("dtd/dtd",), 47, 3760, 1880, 224, "photographs", _RESEARCH),
    "eurosat": _Facts(
        open_eurosat, ("eurosat/2750",), 10, 21600, 2700, 64, "satellite photographs", "MIT"
    ),
    "gtsrb": _Facts(
        _official("GTSRB", "gtsrb"),
        ("gtsrb/GTSRB/Training", "gtsrb/GT-final_test.csv"),
        *(43, 26640, 12630, 64, "photographs", _RESEARCH),
    ),
    "mnist": _Facts(
        open_arrays("MNIST", "MNIST/raw"),
        ("MNIST/raw",),
        10,
        60000,
        10000,
        28,
        "scans",
        "CC BY-SA 3.0",
    ),
    "resisc45": _Facts(
        open_resisc45,
        ("resisc45/NWPU-RESISC45",),
        *(45, 18900, 6300, 224, "aerial photographs", _RESEARCH),
        instead=("huggingface/resisc45",),
        manual=_RESISC,
    ),
    "sun397": _Facts(
        open_sun397,
        ("SUN397/ClassName.txt",),
        *(397, 19850, 19850, 224, "photographs", _RESEARCH),
        manual=_SUN,
    ),
    "svhn": _Facts(
        open_arrays("SVHN", "train_32x32.mat", "test_32x32.mat"),
        ("train_32x32.mat", "test_32x32.mat"),
        *(10, 73257, 26032, 32, "photographs", "non-commercial"),
    ),
    "stl10": _Facts(
        open_arrays("STL10", "stl10_binary"),
        ("stl10_binary",),
        10,
        5000,
        8000,
        96,
        "photographs",
        _NONE,
    ),
    "oxford_pets": _Facts(
        _official("OxfordIIITPet", "oxford-iiit-pet", "trainval"),
        ("oxford-iiit-pet/images",),
        *(37, 3680, 3669, 224, "photographs", "CC BY-SA 4.0"),
    ),
    "flowers102": _Facts(
        _official("Flowers102", "flowers-102"),
        ("flowers-102/jpg",),
        *(102, 1020, 6149, 224, "photographs", _NONE),
    ),
    "cifar100": _Facts(
        open_arrays("CIFAR100", "cifar-100-python"),
        ("cifar-100-python",),
        100,
        50000,
        10000,
        32,
        "photographs",
        _NONE,
    ),
    "pcam": _Facts(
        _official("PCAM", "pcam"), ("pcam",), 2, 262144, 32768, 96, "microscope photographs", "CC0"
    ),
    "fer2013": _Facts(
        open_fer2013,
        ("fer2013",),
        *(7, 28709, 7178, 48, "photographs", _RESEARCH),
        instead=("huggingface/fer2013",),
        manual=_FER,
    ),
    "cifar10": _Facts(
        open_arrays("CIFAR10", "cifar-10-batches-py"),
        ("cifar-10-batches-py",),
        10,
        50000,
        10000,
        32,
        "photographs",
        _NONE,
    ),
    "food101": _Facts(
        _official("Food101", "food-101"),
        ("food-101/images",),
        *(101, 75750, 25250, 224, "photographs", _RESEARCH),
    ),
    "fashion_mnist": _Facts(
        open_arrays("FashionMNIST", "FashionMNIST/raw"),
        ("FashionMNIST/raw",),
        10,
        60000,
        10000,
        28,
        "photographs",
        "MIT",
    ),
    "rendered_sst2": _Facts(
        _official("RenderedSST2", "rendered-sst2"),
        ("rendered-sst2",),
        *(2, 6920, 1821, 224, "renderings", _NONE),
    ),
    "emnist_digits": _Facts(
        open_arrays("EMNIST", "EMNIST/raw", split="digits"),
        ("EMNIST/raw",),
        *(10, 240000, 40000, 28, "scans", "public domain"),
    ),
    "kmnist": _Facts(
        open_arrays("KMNIST", "KMNIST/raw"),
        ("KMNIST/raw",),
        10,
        60000,
        10000,
        28,
        "scans",
        "CC BY-SA 4.0",
    ),
    "emnist_letters": _Facts(
        open_arrays("EMNIST", "EMNIST/raw", split="letters"),
        ("EMNIST/raw",),
        *(26, 124800, 20800, 28, "scans", "public domain"),
    ),
}

# The TALL lists: the first 8, 14 and all 20.
VISION20 = tuple(name for name in _FACTS if name != "emnist_letters")

# The source paper's order, on which its random groups of tasks depend.
PAPER20 = (
    "sun397",
    "cars",
    "resisc45",
    "eurosat",
    "svhn",
    "gtsrb",
    "mnist",
    "dtd",
    "flowers102",
    "pcam",
    "fer2013",
    "oxford_pets",
    "stl10",
    "cifar100",
    "cifar10",
    "food101",
    "fashion_mnist",
    "emnist_letters",
    "kmnist",
    "rendered_sst2",
)


@SUITES.add()
def vision8() -> Suite:
    """The 8 tasks on which most papers merge."""
    return _suite("vision8", VISION20[:8])


@SUITES.add()
def vision14() -> Suite:
    """Those and 6 more, as in arXiv:2405.07813."""
    return _suite("vision14", VISION20[:14])


@SUITES.add()
def vision20() -> Suite:
    """Those and 6 more, as in arXiv:2405.07813 (EMNIST digits)."""
    return _suite("vision20", VISION20)


@SUITES.add()
def paper8() -> Suite:
    """The first 8 of paper20."""
    return _suite("paper8", PAPER20[:8])


@SUITES.add()
def paper20() -> Suite:
    """20 tasks in the order on which the source paper's groups depend (EMNIST letters)."""
    return _suite("paper20", PAPER20)


def _suite(name: str, tasks: tuple[str, ...]) -> Suite:
    return Suite(name, tuple(_task(name, task) for task in tasks))


def _task(suite: str, name: str) -> Task:
    facts = _FACTS[name]
    source = "official files or Hugging Face" if facts.instead else "torchvision"
    # Torchvision fetches the images of SUN397, but not its lists.
    fetch = "" if name == "sun397" else f"mergekit-lit doctor {suite} --tasks {name} --download"
    return Task(
        name=name,
        suite=suite,
        classes=facts.classes,
        train=facts.train,
        test=facts.test,
        image_size=facts.image_size,
        kind=facts.kind,
        source="official files and lists" if name == "sun397" else source,
        licence=facts.licence,
        where=facts.manual,
        fetch=fetch,
        read=_reader(name, facts),
        found=_finder(facts),
    )


def _reader(name: str, facts: _Facts) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:
        try:
            opened = facts.opener(root, download)
        except ImportError:
            raise
        except OSError as error:
            reason = getattr(error, "reason", error.strerror)
            if reason is None:
                # Told in one line already.
                raise
            raise OSError(
                f"Task {name!r} could not be {'fetched to' if download else 'read from'} "
                f"{str(root)!r}: {reason}. Check the folder and the network."
            ) from None
        # Torchvision says RuntimeError of missing and damaged files, but not of all.
        except Exception as error:
            raise ValueError(
                f"Task {name!r} must lie whole under {str(root)!r}, but: {_one_line(error)}"
            ) from None
        return _pool(
            name, opened, root / "decoded", min(size or facts.image_size, facts.image_size)
        )

    return read


def _pool(name: str, opened: Opened, folder: Path, size: int) -> Pool:
    def images(part: str, x: Stack | Items) -> Images:
        if isinstance(x, Stack):
            return stacked(x, folder=folder, name=f"{name}-{part}", content=opened.content)
        return decoded(x, folder=folder, name=f"{name}-{part}", content=opened.content, size=size)

    return Pool(
        train=images("train", opened.train),
        test=images("test", opened.test),
        classes=opened.classes,
        val=None if opened.val is None else images("val", opened.val),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _finder(facts: _Facts) -> Finder:
    def found(root: Path) -> bool:
        official = all((root / path).exists() for path in facts.needs)
        return official or any((root / path).exists() for path in facts.instead)

    return found
