"""This file tells of tasks what `mergekit-lit tasks` lists, and checks data for `doctor`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_lit.core.files import read_json
from mergekit_lit.core.registry import SUITES
from mergekit_lit.data.packs import PACK_FOLDER
from mergekit_lit.data.splits import Images, Pool, SplitOptions, carve, split_hash
from mergekit_lit.data.suites import load_suite
from mergekit_lit.data.tasks import Task

HASHES = PACK_FOLDER / "hashes.json"


def tasks_table(*suites: str, root: Path | None = None) -> list[dict[str, Any]]:
    """Return one row a task: what it is, and where its images are or would come from.

    Args:
        suites: names of suites, or folders; none means every registered suite.
        root: folder of the downloaded data sets; None for the default one.

    Returns:
        Rows of name, suites, classes, train, test, kind, licence, source, present, where, damage
        and seen_by, in the order of the suites. A task of several suites has one row.

    Raises:
        KeyError: an unknown suite.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for suite in suites or SUITES.names():
        loaded = load_suite(suite, root=root)
        for task in loaded.tasks:
            row = rows.setdefault((task.name, task.source), _row(task))
            row["suites"].append(loaded.name)
    return list(rows.values())


def check_data(
    suite: str,
    *,
    tasks: Sequence[str] | None = None,
    root: Path | None = None,
    download: bool = False,
) -> list[dict[str, str]]:
    """Check counts, hashes and leaks of the tasks of a suite.

    A leak is an image of the test set that stands, pixel by pixel, in train or val as well.

    Args:
        suite: name of a suite, or a folder of the user's own tasks.
        tasks: names of some of its tasks; None for all.
        root: folder of the downloaded data sets; None for the default one.
        download: whether to fetch what is not there, or not whole.

    Returns:
        Rows of `status` (`ok`, `warning` or `broken`), `what` and `mend`, at least one a task.

    Raises:
        KeyError: an unknown suite or task.
    """
    try:
        loaded = load_suite(suite, root=root)
    except (ValueError, OSError) as error:
        mend = "put tasks into it, or name another folder"
        return [_finding("broken", f"{suite} cannot be read: {error}", mend)]
    chosen = [loaded.task(name) for name in (loaded.names if tasks is None else tasks)]
    return [row for task in chosen for row in _check(task, download=download)]


def pool_hashes(name: str, pool: Pool) -> dict[str, str]:
    """Return the SHA-256 of a pool's training and test images, as the package ships them."""
    return {
        "train": split_hash(name, pool.classes, pool.train),
        "test": split_hash(name, pool.classes, pool.test),
    }


def _row(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "suites": [],
        "classes": task.classes,
        "train": task.train,
        "test": task.test,
        "kind": task.kind,
        "licence": task.licence,
        "source": task.source,
        "present": task.present(),
        "where": task.remedy(),
        "damage": task.damage,
        "seen_by": list(task.seen_by),
    }


def _check(task: Task, *, download: bool) -> Iterator[dict[str, str]]:
    if not (download or task.present()):
        yield _finding("warning", f"{task.name} is not here", task.remedy())
        return
    try:
        pool = task.pool(download=download)
        problems = [
            *_check_counts(task, pool),
            *_check_hashes(task, pool),
            *_check_leaks(task, pool),
        ]
    except (ValueError, OSError, ImportError) as error:
        yield _finding("broken", f"{task.name} cannot be read: {error}", task.remedy())
        return
    yield from problems
    if not problems:
        what = f"{task.name}: {len(pool.train)} + {len(pool.test)} images, no leak into test"
        yield _finding("ok", what, "")


def _check_counts(task: Task, pool: Pool) -> Iterator[dict[str, str]]:
    expected = {"train": task.train, "test": task.test, "classes": task.classes}
    counts = {"train": len(pool.train), "test": len(pool.test), "classes": len(pool.classes)}
    for what, count in counts.items():
        if count != expected[what]:
            told = f"{task.name} has {count} {what}, but must have {expected[what]}"
            yield _finding("broken", told, task.remedy())


def _check_hashes(task: Task, pool: Pool) -> Iterator[dict[str, str]]:
    shipped = read_json(HASHES).get(task.name) if task.shipped else None
    if shipped is None:
        return
    for part, found in pool_hashes(task.name, pool).items():
        if found != shipped[part]:
            told = f"{task.name}: the {part} images are not those that were shipped"
            yield _finding("broken", told, task.remedy())


def _check_leaks(task: Task, pool: Pool) -> Iterator[dict[str, str]]:
    data = carve(pool, SplitOptions(reserve=0), name=task.name)
    test = _digests(data.test)
    for part, images in (("train", data.train), ("val", data.val)):
        shared = len(test & _digests(images))
        if shared:
            told = f"{task.name}: {shared} test images stand in {part} too"
            yield _finding(
                "warning", told, f"remove them from {part}, or read its scores with care"
            )


def _digests(images: Images) -> set[bytes]:
    return {hashlib.sha256(images.x[i].tobytes()).digest() for i in range(len(images))}


def _finding(status: str, what: str, mend: str) -> dict[str, str]:
    return {"status": status, "what": what, "mend": mend}
