"""This file says where the images come from that a merge looks at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.data.tasks import Task
from mergekit_lit.lit.recalibration import CALIBRATION_IMAGES


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where the images come from that a method looks at, or BatchNorm statistics are made of.

    Attributes:
        suite: name of a suite, or a folder of tasks.
        root: where the data sets lie; `$MERGEKIT_LIT_DATA` by default.
        options: how val and reserve were carved out of train when the experts were trained.
        images: largest number of images of one task, at least 2.
        size: largest side to which images are decoded, in pixels; None keeps the source's.
        download: whether missing images may be fetched.
    """

    suite: str
    root: Path | None = None
    options: SplitOptions = field(default_factory=SplitOptions)
    images: int = CALIBRATION_IMAGES
    size: int | None = None
    download: bool = False

    def tasks(self, names: Sequence[str]) -> Iterator[TaskData]:
        """Yield the images of tasks, each read when it is asked for.

        Raises:
            KeyError: unknown suite or task.
            ValueError: a damaged task.
        """
        for task in self.found(names):
            yield task.load(self.options, root=self.root, size=self.size, download=self.download)

    def found(self, names: Sequence[str]) -> list[Task]:
        """Return the suite's tasks of these names, none of which is read.

        Raises:
            KeyError: unknown suite or task.
            ValueError: a folder without a task.
        """
        suite = load_suite(self.suite, root=self.root)
        return [suite.task(name) for name in names]
