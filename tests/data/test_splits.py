"""Carving: sizes, disjointness, stratification, nesting, and neighbouring data sets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mergekit_lit.data.splits import (
    Images,
    Pool,
    Rows,
    SplitOptions,
    carve,
    neighbour,
    split_hash,
)


def make_pool(n=400, classes=4, seed=0, *, skew=False):
    """Return a pool whose image i holds the number i in its first two bytes."""
    draw = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) ** 2 if skew else np.ones(classes)
    y = draw.choice(classes, n, p=shares / shares.sum())
    x = np.zeros((n, 4, 4, 3), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    test = Images(x[:40] + 1, y[:40].astype(np.int64))
    return Pool(Images(x, y.astype(np.int64)), test, tuple("abcdefgh"[:classes]))


def numbers(images):
    x = np.asarray(images.x)
    return (x[:, 0, 0, 0].astype(int) + 256 * x[:, 0, 0, 1].astype(int)).tolist()


def test_parts_are_disjoint_and_make_up_the_pool():
    pool = make_pool()
    data = carve(pool, SplitOptions(), name="t", suite="s")
    parts = [numbers(p) for p in (data.train, data.val, data.reserve)]
    assert [len(part) for part in parts] == [400 - 40 - 64, 40, 64]
    assert sorted(itertools.chain(*parts)) == list(range(400))
    assert parts[0] == sorted(parts[0])
    assert data.test is pool.test
    for part, images in zip(parts, (data.train, data.val, data.reserve), strict=True):
        np.testing.assert_array_equal(images.y, pool.train.y[part])


def test_val_keeps_the_shares_of_the_classes():
    pool = make_pool(2000, skew=True)
    val = carve(pool, SplitOptions(val_share=0.2), name="t").val
    expected = np.bincount(pool.train.y) * 0.2
    assert np.abs(np.bincount(val.y) - expected).max() <= 1


def test_val_is_capped_at_5000_images():
    y = np.arange(60_000) % 10
    pool = Pool(Images(np.zeros((60_000, 1, 1, 3), np.uint8), y), make_pool().test, tuple("abcd"))
    assert len(carve(pool, SplitOptions(), name="t").val) == 5000


def test_a_fixed_val_is_kept():
    pool = make_pool()
    fixed = pool.train.subset(np.arange(7))
    data = carve(replace(pool, val=fixed), SplitOptions(reserve=0), name="t")
    assert data.val is fixed
    assert len(data.train) == 400


def test_reserve_and_val_depend_on_neither_share_nor_n():
    pool = make_pool()
    whole = carve(pool, SplitOptions(seed=3), name="t")
    part = carve(pool, SplitOptions(seed=3, train_share=0.5, n=50), name="t")
    assert numbers(part.reserve) == numbers(whole.reserve)
    assert numbers(part.val) == numbers(whole.val)


@pytest.mark.parametrize("seed", [0, 1])
def test_subsets_are_nested_and_balanced(seed):
    pool = make_pool(1000, skew=True)
    sets = [
        carve(pool, SplitOptions(n=n, seed=seed), name="t").train for n in (2, 9, 40, 200, None)
    ]
    for small, large in itertools.pairwise(sets):
        assert set(numbers(small)) < set(numbers(large))
    assert np.bincount(sets[2].y).tolist() == [10, 10, 10, 10]
    # Class a has some 30 images: all are taken, and the rest is shared evenly.
    counts = np.bincount(sets[3].y)
    assert counts[0] == np.bincount(sets[4].y)[0]
    assert np.ptp(counts[1:]) <= 1


def test_the_train_share_keeps_the_shares_of_the_classes():
    pool = make_pool(1000, skew=True)
    whole = carve(pool, SplitOptions(), name="t").train
    half = carve(pool, SplitOptions(train_share=0.5), name="t").train
    assert len(half) == len(whole) // 2
    assert np.abs(np.bincount(half.y) - np.bincount(whole.y) / 2).max() <= 1


def test_seeds_change_the_split_and_nothing_else_does():
    pool = make_pool()
    hashes = [carve(pool, SplitOptions(seed=s), name="t").split_hash for s in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_split_hash_sees_names_images_labels_and_order():
    images = make_pool().train
    reference = split_hash("t", ("a", "b"), images)
    other_label = images.y.copy()
    other_label[5] += 1
    other_pixel = images.x.copy()
    other_pixel[5, 1, 1, 1] += 1
    changed = [
        split_hash("u", ("a", "b"), images),
        split_hash("t", ("a", "c"), images),
        split_hash("t", ("a", "b"), images.subset(np.arange(400)[::-1])),
        split_hash("t", ("a", "b"), Images(images.x, other_label)),
        split_hash("t", ("a", "b"), Images(other_pixel, images.y)),
    ]
    assert len({reference, *changed}) == 6
    assert split_hash("t", ("a", "b"), images.subset(np.arange(400))) == reference


@pytest.mark.parametrize("m", [0, 1, 4, 64])
def test_a_neighbour_differs_in_m_positions_by_reserve_images(m):
    data = carve(make_pool(), SplitOptions(), name="t")
    other = neighbour(data, m, seed=5)
    before, after = numbers(data.train), numbers(other.train)
    differ = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert sorted(other.replaced_positions) == differ
    assert other.replaced == m == len(differ)
    assert {after[i] for i in differ} <= set(numbers(data.reserve))
    assert len({after[i] for i in differ}) == m
    assert (other.split_hash == data.split_hash) == (m == 0)
    np.testing.assert_array_equal(other.val.x, data.val.x)


def test_neighbours_of_one_seed_are_nested_and_other_seeds_differ():
    data = carve(make_pool(), SplitOptions(), name="t")
    few, many, other = neighbour(data, 4, 5), neighbour(data, 16, 5), neighbour(data, 4, 6)
    assert many.replaced_positions[:4] == few.replaced_positions
    assert other.replaced_positions != few.replaced_positions


def test_a_neighbour_leaves_its_data_as_it_was():
    data = carve(make_pool(), SplitOptions(), name="t")
    before = np.array(data.train.x)
    neighbour(data, 16, 0)
    np.testing.assert_array_equal(data.train.x, before)


def test_images_on_disk_stay_there(tmp_path):
    pool = make_pool()
    np.save(tmp_path / "x.npy", pool.train.x)
    mapped = Images(np.load(tmp_path / "x.npy", mmap_mode="r"), pool.train.y)
    in_memory = carve(pool, SplitOptions(n=100), name="t")
    on_disk = carve(replace(pool, train=mapped), SplitOptions(n=100), name="t")
    assert isinstance(on_disk.train.x, Rows)
    assert on_disk.train.x.shape == (100, 4, 4, 3)
    assert on_disk.split_hash == in_memory.split_hash
    twin = neighbour(on_disk, 4, 0)
    assert isinstance(twin.train.x, Rows)
    assert twin.split_hash == neighbour(in_memory, 4, 0).split_hash
    np.testing.assert_array_equal(twin.train.x[3:9], neighbour(in_memory, 4, 0).train.x[3:9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": -0.1}, r"`val_share` must lie in \[0, 1\), but is -0.1"),
        ({"val_share": 1.0}, r"`val_share` must lie in \[0, 1\), but is 1.0"),
        ({"train_share": 0.0}, r"`train_share` must lie in \(0, 1\], but is 0.0"),
        ({"train_share": 1.5}, r"`train_share` must lie in \(0, 1\], but is 1.5"),
        ({"reserve": -1}, "`reserve` must be at least 0, but is -1"),
        ({"reserve": 359}, "`reserve` must leave at least 2 images to train on, but is 359 of 360"),
        ({"n": 1}, r"`n` must lie in 2\.\.296, .* but is 1"),
        ({"n": 297}, r"`n` must lie in 2\.\.296, .* but is 297"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        carve(make_pool(), SplitOptions(**options), name="t")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("m", [-1, 65])
def test_too_many_replacements_are_refused(m):
    data = carve(make_pool(), SplitOptions(), name="t")
    with pytest.raises(ValueError, match=r"`neighbour` must lie in 0\.\.64"):
        neighbour(data, m, 0)


def test_a_neighbour_of_a_neighbour_is_refused():
    data = neighbour(carve(make_pool(), SplitOptions(), name="t"), 1, 0)
    with pytest.raises(ValueError, match="original data set"):
        neighbour(data, 1, 1)
