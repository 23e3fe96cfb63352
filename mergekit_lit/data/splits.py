"""This file carves a pool of images into train, val and reserve, and makes neighbouring sets."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergekit_lit.core.seeds import derive_seed

Array = np.ndarray[Any, Any]

LARGEST_VAL = 5000
_CHUNK = 4096


class Rows:
    """Some rows of a large array on disk, read when indexed: what `array[rows]` would copy."""

    def __init__(self, store: Array, rows: Array) -> None:
        self.store = store
        self.rows = rows
        self.shape = (len(rows), *store.shape[1:])
        self.dtype = store.dtype
        self.nbytes = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Array:
        """Read images by index, slice, mask or array of indices."""
        return np.asarray(self.store[self.rows[key]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001
        """Read all rows into memory."""
        del copy
        return np.asarray(self.store[self.rows], dtype=dtype)


@dataclass(frozen=True)
class Images:
    """Decoded images and their labels.

    Attributes:
        x: uint8 (N, H, W, 3), in memory or read from disk when indexed.
        y: int64 (N,) labels.
    """

    x: Array | Rows
    y: Array

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, indices: Array) -> "Images":
        """Return the images at `indices`, in that order; images on disk stay there."""
        if isinstance(self.x, Rows):
            return Images(Rows(self.x.store, self.x.rows[indices]), self.y[indices])
        if isinstance(self.x, np.memmap):
            return Images(Rows(self.x, np.asarray(indices)), self.y[indices])
        return Images(self.x[indices], self.y[indices])

    def replaced(self, positions: Array, others: "Images") -> "Images":
        """Return a copy with `others` at `positions`; every other image keeps its place."""
        y = self.y.copy()
        y[positions] = others.y
        mine, theirs = self.x, others.x
        if isinstance(mine, Rows) and isinstance(theirs, Rows) and mine.store is theirs.store:
            rows = mine.rows.copy()
            rows[positions] = theirs.rows
            return Images(Rows(mine.store, rows), y)
        x = np.array(self.x)
        x[positions] = np.asarray(others.x)
        return Images(x, y)


@dataclass(frozen=True)
class Pool:
    """A task as its source hands it out, before any carving.

    Attributes:
        train: the official training pool.
        test: the official test set, or ours where the source has none.
        classes: C class names.
        val: a validation set that the source fixes; None where it is carved from train.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    val: Images | None = None


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a pool is carved.

    Attributes:
        val_share: share of the pool for validation, in [0, 1), at most 5,000 images.
        reserve: images that no run trains on, from which neighbouring data sets are made.
        train_share: share of what is left that is trained on, in (0, 1].
        n: size of the training set, at least 2; None takes all.
        seed: seed of every choice.
    """

    val_share: float = 0.1
    reserve: int = 64
    train_share: float = 1.0
    n: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The images of one task, carved.

    Attributes:
        name: the task's name.
        suite: the suite's name.
        classes: C class names.
        train: training images, in the order that positions refer to.
        val: validation images.
        test: test images; never used to choose anything.
        reserve: images that no run trains on.
        split_hash: SHA-256 over the task's name, class names, training images and labels, in order.
        replaced: m, training images replaced from the reserve.
        replaced_positions: where in `train` they stand, in the order drawn.
        neighbour_seed: which neighbouring data set this is; None for an original.
        original: of a neighbouring data set the one that it neighbours, else None.
    """

    name: str
    suite: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    reserve: Images
    split_hash: str
    replaced: int = 0
    replaced_positions: tuple[int, ...] = ()
    neighbour_seed: int | None = None
    original: "TaskData | None" = None

    @property
    def start(self) -> "TaskData":
        """The data that training starts from: head and first statistics are fitted on it.

        Neighbours share their original's, so that they part only when a replaced image is trained
        on.
        """
        return self.original or self

    def without_test(self) -> "TaskData":
        """Return the task without its test images."""
        return replace(self, test=self.test.subset(np.zeros(0, dtype=np.int64)))


def carve(pool: Pool, options: SplitOptions, *, name: str, suite: str = "") -> TaskData:
    """Carve validation, reserve and training images out of the training pool.

    Validation is stratified: min(5000, floor(val_share N)) images of a pool of N. The reserve is
    drawn uniformly from what is left, as theory asks. The training set is then a stratified share,
    and of that a class-balanced subset of n. Val and reserve depend on neither share nor n, and for
    one seed the smaller training set is part of the larger.

    Raises:
        ValueError: an option is out of range for this pool.
    """
    _check_options(options)
    y = pool.train.y
    seed = options.seed
    rest = np.arange(len(y))
    val = pool.val
    if val is None:
        count = min(LARGEST_VAL, int(options.val_share * len(y) + 1e-9))
        order = proportional_order(y, seed, "val")
        val, rest = pool.train.subset(np.sort(order[:count])), np.sort(order[count:])
    _check_reserve(options.reserve, len(rest))
    drawn = _draw(seed, "reserve").permutation(rest)
    reserve, rest = drawn[: options.reserve], np.sort(drawn[options.reserve :])
    if options.train_share < 1:
        order = rest[proportional_order(y[rest], seed, "share")]
        rest = np.sort(order[: max(2, int(options.train_share * len(rest) + 1e-9))])
    if options.n is not None:
        _check_n(options.n, len(rest))
        rest = np.sort(rest[balanced_order(y[rest], seed, "n")[: options.n]])
    train = pool.train.subset(rest)
    return TaskData(
        name=name,
        suite=suite,
        classes=pool.classes,
        train=train,
        val=val,
        test=pool.test,
        reserve=pool.train.subset(reserve),
        split_hash=split_hash(name, pool.classes, train),
    )


def neighbour(data: TaskData, m: int, seed: int) -> TaskData:
    """Return the neighbouring data set S^(j): m training images replaced from the reserve.

    All others keep their positions, so that coupled runs see them in the same batches.

    Args:
        data: the task, carved with a reserve of at least m.
        m: images replaced, from 0 (the same data again) to the size of the reserve.
        seed: which neighbour.

    Raises:
        ValueError: m is out of range, or the data is a neighbour already.

    Source: Lei & Ying 2020, arXiv:2006.08157, definition 4 (m = 1: on-average stability).
    """
    positions, others = replacement(data, m, seed)
    train = data.train.replaced(positions, others)
    return replace(
        data,
        train=train,
        split_hash=split_hash(data.name, data.classes, train),
        replaced=m,
        replaced_positions=tuple(int(position) for position in positions),
        neighbour_seed=seed,
        original=data,
    )


def replacement(
    data: TaskData, m: int, seed: int, *, name: str = "neighbour"
) -> tuple[Array, Images]:
    """Return which training images a neighbouring data set replaces, and by what.

    Both are drawn by `seed`; those of a smaller m are the first of a larger m's.

    Args:
        data: the task, carved with a reserve of at least m.
        m: images replaced, at least 0.
        seed: which neighbour.
        name: the argument that says m, for messages.

    Returns:
        Positions (m,) in the training set, and m images of the reserve.

    Raises:
        ValueError: m is out of range, or the data is a neighbour already.
    """
    limits = {
        "the reserve": (len(data.reserve), "Replace fewer images, or carve a larger `reserve`."),
        "the training images": (len(data.train), "Replace fewer images."),
    }
    what, (largest, remedy) = min(limits.items(), key=lambda item: item[1][0])
    if not 0 <= m <= largest:
        raise ValueError(
            f"`{name}` must lie in 0..{largest}, {what} of task {data.name!r}, but is {m}. {remedy}"
        )
    if data.original:
        raise ValueError("`data` must be an original data set, but is a neighbour of one already.")
    positions = _draw(seed, "neighbour", "positions").permutation(len(data.train))[:m]
    others = _draw(seed, "neighbour", "reserve").permutation(len(data.reserve))[:m]
    return positions, data.reserve.subset(others)


def split_hash(name: str, classes: tuple[str, ...], images: Images) -> str:
    """Return the SHA-256 over names, shape, images and labels, in order."""
    digest = hashlib.sha256()
    for text in (name, *classes, *map(str, images.x.shape)):
        digest.update(text.encode() + b"\x00")
    for start in range(0, len(images), _CHUNK):
        digest.update(np.ascontiguousarray(images.x[start : start + _CHUNK]).data)
    digest.update(np.ascontiguousarray(images.y, dtype="<i8").data)
    return digest.hexdigest()


def to_rgb(x: Array) -> Array:
    """Return (N, H, W) or (N, H, W, 1) grey images as (N, H, W, 3); RGB ones as they are."""
    if x.ndim == 3:
        x = x[..., None]
    return np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def balanced_order(y: Array, seed: int, *key: str) -> Array:
    """Return a seeded order in which every prefix holds the classes as evenly as they last."""
    ranks, tie = _ranks(y, _draw(seed, *key))
    return np.lexsort((tie, ranks))


def proportional_order(y: Array, seed: int, *key: str) -> Array:
    """Return a seeded order in which every prefix holds the classes in proportion to their size."""
    ranks, tie = _ranks(y, _draw(seed, *key))
    _, inverse, sizes = np.unique(y, return_inverse=True, return_counts=True)
    return np.lexsort((tie, (ranks + 0.5) / sizes[inverse]))


def _draw(seed: int, *key: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "split", *key))


def _ranks(y: Array, draw: np.random.Generator) -> tuple[Array, Array]:
    """Return each sample's random rank within its class, and a random key that breaks ties."""
    tie = draw.permutation(len(y))
    order = np.lexsort((tie, y))
    sizes = np.unique(y, return_counts=True)[1]
    ranks = np.empty(len(y), dtype=np.int64)
    ranks[order] = np.concatenate([np.arange(size) for size in sizes])
    return ranks, tie


def _check_options(options: SplitOptions) -> None:
    if not 0 <= options.val_share < 1:
        raise ValueError(f"`val_share` must lie in [0, 1), but is {options.val_share}.")
    if not 0 < options.train_share <= 1:
        raise ValueError(f"`train_share` must lie in (0, 1], but is {options.train_share}.")
    if options.reserve < 0:
        raise ValueError(f"`reserve` must be at least 0, but is {options.reserve}.")


def _check_reserve(reserve: int, available: int) -> None:
    if reserve > available - 2:
        raise ValueError(
            f"`reserve` must leave at least 2 images to train on, but is {reserve} of {available}. "
            "Carve a smaller `reserve` or `val_share`."
        )


def _check_n(n: int, available: int) -> None:
    if not 2 <= n <= available:
        raise ValueError(
            f"`n` must lie in 2..{available}, what val, reserve and share leave, but is {n}."
        )
