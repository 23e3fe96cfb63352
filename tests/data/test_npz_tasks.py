"""The user's own npz files: both layouts, large ones, and one clear line for bad input."""

import pickle

import numpy as np
import pytest

from mergekit_lit.data.npz_tasks import read_npz
from mergekit_lit.data.splits import Rows, SplitOptions
from mergekit_lit.data.suites import load_suite

DRAW = np.random.default_rng(0)


def one_layout(**changes):
    members = {
        "x": DRAW.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8),
        "y": (np.arange(30) % 3).astype(np.uint16),
        "split": np.repeat([0, 1], [20, 10]).astype(np.int8),
        "classes": np.array(["a", "b", "c"]),
    }
    return {key: value for key, value in (members | changes).items() if value is not None}


def two_layout(**changes):
    one = one_layout()
    members = {
        "x_train": one["x"][:20],
        "x_test": one["x"][20:],
        "y_train": one["y"][:20],
        "y_test": one["y"][20:],
        "classes": one["classes"],
    }
    return {key: value for key, value in (members | changes).items() if value is not None}


@pytest.mark.parametrize("layout", [one_layout, two_layout])
def test_both_npz_layouts_are_read(tmp_path, layout):
    members = layout()
    np.savez(tmp_path / "own.npz", **members)
    suite = load_suite(str(tmp_path))
    task = suite.task("own")
    assert (suite.name, suite.names) == (tmp_path.name, ("own",))
    assert (task.classes, task.train, task.test, task.image_size) == (3, 20, 10, 8)
    assert task.present()
    data = task.load(SplitOptions(reserve=4))
    assert (len(data.train), len(data.val), len(data.reserve), len(data.test)) == (14, 2, 4, 10)
    expected = members["x"][20:] if "x" in members else members["x_test"]
    np.testing.assert_array_equal(data.test.x, expected)
    assert data.train.y.dtype == np.int64
    assert data.classes == ("a", "b", "c")
    assert data.suite == tmp_path.name


@pytest.mark.parametrize("shape", [(30, 8, 8), (30, 8, 8, 1)])
def test_grey_images_become_rgb(tmp_path, shape):
    x = DRAW.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "own.npz", **one_layout(x=x))
    pool = read_npz(tmp_path / "own.npz")
    assert pool.train.x.shape == (20, 8, 8, 3)
    for channel in range(3):
        np.testing.assert_array_equal(pool.train.x[..., channel], x.reshape(30, 8, 8)[:20])


OBJECTS = np.array([{"a": 1}] * 30, dtype=object)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (one_layout(classes=None), "but lacks classes"),
        (two_layout(y_test=None), "but lacks y_test"),
        (one_layout(x=np.zeros((30, 8, 8, 3), np.float32)), "uint8 .* but has float32"),
        (one_layout(x=np.zeros((30, 8), np.uint8)), r"but has uint8 \(30, 8\)"),
        (one_layout(x=np.zeros((29, 8, 8), np.uint8)), "one label an image, but has 30 for 29"),
        (one_layout(y=np.arange(30) % 4), r"labels in 0\.\.2 for 3 classes, but has 3"),
        (one_layout(y=np.arange(30) % 3 - 1), r"labels in 0\.\.2 for 3 classes, but has -1"),
        (one_layout(y=np.zeros(30)), "integer labels"),
        (one_layout(y=np.zeros(30, int)), "at least 2 classes, but has one"),
        (one_layout(classes=np.array("abc")), r"class names \(C,\), but has \(\)"),
        (two_layout(y_test=np.array(0)), r"labels \(N,\), but has \(20,\) and \(\)"),
        (one_layout(x=np.zeros((30, 0, 8), np.uint8)), r"but has uint8 \(30, 0, 8\)"),
        (one_layout(split=np.zeros(30, int)), "one of them is empty"),
        (one_layout(split=np.arange(30)), "split numbers 0"),
        (one_layout(x=OBJECTS), "holds objects, which only pickle reads"),
        (one_layout(y=OBJECTS), "holds objects, which only pickle reads"),
        (two_layout(x_test=np.zeros((10, 9, 9, 3), np.uint8)), "x_train and x_test of one shape"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, members, message):
    np.savez(tmp_path / "own.npz", **members)
    with pytest.raises(ValueError, match=message) as caught:
        load_suite(str(tmp_path)).task("own").load()
    assert "\n" not in str(caught.value)
    assert "own.npz" in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, **one_layout())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"own.npz' must be a whole npz file, but is damaged"):
        load_suite(str(tmp_path)).task("own").load()


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **one_layout())
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="must be a whole npz file, but is damaged"):
        load_suite(str(tmp_path)).task("own").load()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"x": 1})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"own.npz' must be a whole npz file") as caught:
        load_suite(str(tmp_path)).task("own").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", [one_layout, two_layout])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_arrays_are_mapped_and_hand_out_the_same_bytes(tmp_path, monkeypatch, layout, save):
    save(tmp_path / "own.npz", **layout())
    task = load_suite(str(tmp_path), root=tmp_path / "root").task("own")
    options = SplitOptions(reserve=4, n=8)
    expected = task.load(options)
    assert not (tmp_path / "root").exists()
    monkeypatch.setattr("mergekit_lit.data.keeping.LARGE", 1000)
    monkeypatch.setattr("mergekit_lit.data.archives._BLOCK", 1000)
    for _ in range(2):
        data = task.load(options)
        assert isinstance(data.train.x, Rows)
        assert isinstance(data.train.x.store, np.memmap)
        assert data.split_hash == expected.split_hash
        for part in ("train", "val", "reserve", "test"):
            mapped, in_memory = getattr(data, part), getattr(expected, part)
            np.testing.assert_array_equal(np.asarray(mapped.x), in_memory.x)
            np.testing.assert_array_equal(mapped.y, in_memory.y)
        # The second time nothing is read from the zip but labels.
        monkeypatch.setattr("mergekit_lit.data.archives.Member.blocks", None)


def test_a_kept_array_that_is_damaged_is_made_again(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", **one_layout())
    monkeypatch.setattr("mergekit_lit.data.keeping.LARGE", 1000)
    expected = np.array(read_npz(tmp_path / "own.npz", root=tmp_path).train.x)
    (kept,) = (tmp_path / "decoded").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"\x80" + whole[1:], whole[:10] + whole):
        kept.write_bytes(damaged)
        x = read_npz(tmp_path / "own.npz", root=tmp_path).train.x
        np.testing.assert_array_equal(np.asarray(x), expected)
        assert kept.read_bytes() == whole


def test_damage_leaves_no_large_array_behind(tmp_path, monkeypatch):
    path = tmp_path / "own.npz"
    np.savez(path, **one_layout())
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))
    monkeypatch.setattr("mergekit_lit.data.keeping.LARGE", 1000)
    with pytest.raises(ValueError, match="Bad CRC"):
        read_npz(path, root=tmp_path)
    assert list((tmp_path / "decoded").iterdir()) == []
