"""This file holds the noun Suite, and finds suites by name or folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lit.core.registry import SUITES, unknown_name
from mergekit_lit.data.folders import folder_tasks
from mergekit_lit.data.tasks import Task


@dataclass(frozen=True)
class Suite:
    """An ordered list of tasks.

    Attributes:
        name: the suite's name, or the folder's.
        tasks: tasks with unique names.
    """

    name: str
    tasks: tuple[Task, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        """Return one task.

        Raises:
            KeyError: no such task; the message offers the nearest and lists all.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(unknown_name(f"task of suite {self.name!r}", name, self.names))

    def chosen(self, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the names of the tasks to work on, all of them by default, before any work.

        Raises:
            KeyError: no such task.
            ValueError: no name, a name twice, or a task whose files are damaged.
        """
        if names is None:
            names = self.names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Each task must be named once, but the names are {list(names)!r}.")
        for name in names:
            if self.task(name).damage:
                raise ValueError(self.task(name).damage)
        return tuple(names)


def load_suite(name_or_folder: str, *, root: Path | None = None) -> Suite:
    """Return a suite by its name, or one of the user's own tasks by its folder.

    A folder holds <task>.npz files or folders <task>/{train,test}/<class>/ of images; links are
    followed, and names that start with a dot passed over. A registered name comes first: write
    ./embedded8 for a folder of that name.

    Args:
        name_or_folder: `embedded8`, `vision20`, ... or the path of a folder.
        root: folder of the downloaded data sets; None for the default one.

    Raises:
        KeyError: neither a suite nor a folder.
        ValueError: the folder holds no task.
    """
    name = str(name_or_folder)
    if name in SUITES.names():
        suite: Suite = SUITES.get(name).function()
    elif name and Path(name).is_dir():
        suite = Suite(Path(name).resolve().name, folder_tasks(Path(name)))
    else:
        known = unknown_name("suite", name, SUITES.names())
        raise KeyError(f"{known} Or give a folder of your own tasks.")
    return replace(suite, tasks=tuple(replace(task, root=root) for task in suite.tasks))
