"""This file is the images that pretraining sees: ten source tasks, none of them in `embedded8`."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite

SCRIPTS = ("greek", "thai", "katakana", "arabic")
_WHOLE = SplitOptions(val_share=0.0, reserve=0)


@dataclass(frozen=True)
class Pool:
    """All source images in one array.

    Attributes:
        x: uint8 (N, 32, 32, 3).
        y: class, counted over all tasks, (N,).
        task: index of the task, (N,).
        plain: whether the task's images are grey, (N,) bool.
        first: index of the first class of each task, and the number of classes, (T + 1,).
        names: T task names.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    plain: Tensor
    first: Tensor
    names: tuple[str, ...]


def make_pool(split: str) -> Pool:
    """Return the source tasks' images of one split, `train` or `test`."""
    tasks = _tasks()
    first = np.cumsum([0, *(len(task.classes) for task in tasks)])
    images = [getattr(task, split) for task in tasks]
    sizes = [len(part) for part in images]
    x = torch.from_numpy(np.concatenate([np.asarray(part.x) for part in images]))
    y = np.concatenate([part.y + start for part, start in zip(images, first, strict=False)])
    grey = [_is_grey(np.asarray(part.x)) for part in images]
    return Pool(
        x=x,
        y=torch.from_numpy(y),
        task=torch.from_numpy(np.repeat(np.arange(len(tasks)), sizes)),
        plain=torch.from_numpy(np.repeat(grey, sizes)),
        first=torch.from_numpy(first),
        names=tuple(task.name for task in tasks),
    )


def without_shared_classes(pool: Pool) -> tuple[Pool, dict[str, int]]:
    """Leave out each source class that holds an image of `embedded8`, and return what was left out.

    Whole classes, since a Greek capital that equals a Latin one in some fonts resembles it in all.

    Raises:
        ValueError: a source image still equals one of `embedded8`.
    """
    targets = {
        image.tobytes()
        for task in load_suite("embedded8").tasks
        for images in _both(task.load(_WHOLE))
        for image in images
    }
    equal = torch.tensor([image.tobytes() in targets for image in pool.x.numpy()])
    keep = ~torch.isin(pool.y, pool.y[equal].unique())
    if bool((equal & keep).any()):
        raise ValueError("Source tasks must share no image with embedded8, but still do.")
    fields = ("x", "y", "task", "plain")
    kept = replace(pool, **{name: getattr(pool, name)[keep] for name in fields})
    found = {"target_images": len(targets), "equal_images": int(equal.sum())}
    return kept, found | {"images_left_out": int((~keep).sum()), "images": len(kept.x)}


def _tasks() -> list[TaskData]:
    drawings = load_suite("sources").tasks
    scripts = [load_suite("embedded20").task(name) for name in SCRIPTS]
    return [task.load(_WHOLE) for task in (*drawings, *scripts)]


def _both(task: TaskData) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(task.train.x), np.asarray(task.test.x)


def _is_grey(x: np.ndarray) -> bool:
    return bool((x == x[..., :1]).all())
