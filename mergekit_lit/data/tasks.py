"""This file holds the noun Task: what is known of a task before its images are read."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mergekit_lit.data.splits import Pool, SplitOptions, TaskData, carve

ROOT_VARIABLE = "MERGEKIT_LIT_DATA"


class Reader(Protocol):
    """Reads a task's pool; `size` bounds the side of decoded images, None keeps the task's own."""

    def __call__(self, root: Path, *, size: int | None, download: bool) -> Pool:
        """Read the pool."""


class Finder(Protocol):
    """Tells whether a task's images are on disk, without reading them."""

    def __call__(self, root: Path) -> bool:
        """Tell whether the images are under `root`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task, and how its images are found and read.

    Attributes:
        name: unique in its suite.
        suite: the suite's name.
        classes: C, number of classes.
        train: size of the official training pool, before anything is carved.
        test: size of the official test set.
        image_size: height and width of the decoded images, in pixels.
        kind: `photographs`, `scans`, `masks of photographs`, `drawings` or `renderings`.
        source: where the images come from.
        licence: under which they may be used.
        where: what to do to have them here; empty where a command does it all.
        read: reads the pool.
        found: tells whether it can be read.
        seen_by: shipped bases whose pretraining saw this task or drawings of it.
        shipped: whether the images are inside the package, with their hashes.
        fetch: command that fetches the images; empty where there is none.
        root: folder of the data sets; None for the default one.
        damage: what is wrong with the user's own files, in one line; empty where nothing is known.
    """

    name: str
    suite: str
    classes: int
    train: int
    test: int
    image_size: int
    kind: str
    source: str
    licence: str
    where: str
    read: Reader
    found: Finder
    seen_by: tuple[str, ...] = ()
    shipped: bool = False
    fetch: str = ""
    root: Path | None = None
    damage: str = ""

    def present(self, root: Path | None = None) -> bool:
        """Tell whether the images are here; reads none of them."""
        return self.found(data_root(root or self.root))

    def remedy(self, root: Path | None = None) -> str:
        """Return what to do to have the images here, and the command that does it if there is one.

        Args:
            root: folder of the data sets; None for the default one.
        """
        if not self.fetch:
            return self.where
        folder = root or self.root
        command = self.fetch + (f" --root {shlex.quote(str(folder))}" if folder else "")
        return f"{self.where}, or fetch it: {command}" if self.where else f"Fetch it: {command}"

    def pool(
        self, root: Path | None = None, *, size: int | None = None, download: bool = False
    ) -> Pool:
        """Read the official training pool and test set.

        Raises:
            FileNotFoundError: the images are not here and `download` is False.
            ValueError: they are damaged, or not what they must be, or `size` is below 1.
        """
        if size is not None and size < 1:
            raise ValueError(f"`size` must be at least 1 pixel, but is {size}.")
        folder = data_root(root or self.root)
        if not (download or self.shipped or self.found(folder)):
            raise FileNotFoundError(
                f"Task {self.name!r} must lie under {str(folder)!r}, but is not there. "
                f"{self.remedy(root)}"
            )
        return self.read(folder, size=size, download=download)

    def load(
        self,
        options: SplitOptions | None = None,
        root: Path | None = None,
        *,
        size: int | None = None,
        download: bool = False,
    ) -> TaskData:
        """Read the task and carve it.

        Args:
            options: shares, sizes and seed of the carving; None for the defaults.
            root: folder of the data sets; None for the default one.
            size: largest side of the decoded images, in pixels; None keeps the task's own.
            download: whether missing images may be fetched.

        Raises:
            FileNotFoundError: the images are not here and `download` is False.
            ValueError: they are damaged, or an option is out of range.
        """
        pool = self.pool(root, size=size, download=download)
        return carve(pool, options or SplitOptions(), name=self.name, suite=self.suite)


def data_root(root: Path | None = None) -> Path:
    """Return the folder of the data sets: given, $MERGEKIT_LIT_DATA, or the user's cache.

    Raises:
        ValueError: it, or what should be a folder above it, is a file.
    """
    named = root or os.environ.get(ROOT_VARIABLE)
    folder = Path(named) if named else Path.home() / ".cache" / "mergekit-lit" / "data"
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(
            f"The `root` of the data sets must be a folder, but {str(nearest)!r} is a file. "
            f"Name another `root`, or set {ROOT_VARIABLE}."
        )
    return folder


def exists(path: Path) -> Finder:
    """Return a finder of one's own file or folder, wherever the data sets lie."""

    def found(root: Path) -> bool:  # noqa: ARG001 (own file)
        return path.exists()

    return found
