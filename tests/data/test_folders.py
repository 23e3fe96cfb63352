"""The user's own tasks: both npz layouts, image folders, and one clear line for bad input."""

import pickle

import numpy as np
import pytest
from PIL import Image

from mergekit_lit.data.folders import read_npz
from mergekit_lit.data.splits import SplitOptions
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
        load_suite(str(tmp_path))


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
        load_suite(str(tmp_path))
    assert "\n" not in str(caught.value)


def write_images(folder, sizes=(8, 8)):
    """Write 2 classes, 12 + 4 images; the colour tells class and number."""
    for part, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", sizes, (label * 100, i, 7))
                image.save(folder / part / name / f"{i}.png")


def test_image_folders_are_decoded_once(tmp_path, monkeypatch):
    write_images(tmp_path / "suite" / "pets")
    root = tmp_path / "root"
    task = load_suite(str(tmp_path / "suite"), root=root).task("pets")
    assert (task.classes, task.train, task.test, task.image_size) == (2, 12, 4, 8)
    pool = task.pool()
    assert pool.classes == ("cat", "dog")
    assert pool.train.y.tolist() == [0] * 6 + [1] * 6
    expected = [[label * 100, i, 7] for label in (0, 1) for i in range(6)]
    assert pool.train.x[:, 3, 3].tolist() == expected
    kept = sorted((root / "decoded").iterdir())
    assert len(kept) == 4
    monkeypatch.setattr("mergekit_lit.data.decoding.square", None)
    np.testing.assert_array_equal(task.pool().train.x, pool.train.x)


def test_a_changed_folder_is_decoded_again(tmp_path):
    write_images(tmp_path / "suite" / "pets")
    task = load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets")
    task.pool()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "suite/pets/train/cat/0.png")
    assert task.pool().train.x[0, 0, 0].tolist() == [9, 9, 9]


def test_images_of_any_shape_are_cropped_at_the_centre(tmp_path):
    folder = tmp_path / "suite" / "pets"
    write_images(folder)
    wide = Image.new("L", (32, 8), 0)
    wide.paste(255, (12, 0, 20, 8))
    wide.save(folder / "train" / "cat" / "0.png")
    pool = load_suite(str(tmp_path / "suite"), root=tmp_path).task("pets").pool()
    assert (pool.train.x[0] == 255).all()
    smaller = (
        load_suite(str(tmp_path / "suite"), root=tmp_path)
        .task("pets")
        .load(SplitOptions(reserve=1), size=4)
    )
    assert smaller.train.x.shape[1:] == (4, 4, 3)


def test_large_arrays_are_mapped(tmp_path, monkeypatch):
    write_images(tmp_path / "suite" / "pets")
    monkeypatch.setattr("mergekit_lit.data.decoding.LARGE", 1000)
    pool = load_suite(str(tmp_path / "suite"), root=tmp_path).task("pets").pool()
    assert isinstance(pool.train.x, np.memmap)
    assert not isinstance(pool.test.x, np.memmap)


def test_a_damaged_image_is_named_and_leaves_nothing_behind(tmp_path):
    write_images(tmp_path / "suite" / "pets")
    broken = tmp_path / "suite/pets/train/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:45])
    task = load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets")
    with pytest.raises(ValueError, match=r"dog/3.png' must be a whole image"):
        task.load()
    assert list((tmp_path / "root" / "decoded").iterdir()) == []


def test_a_class_that_train_lacks_is_named(tmp_path):
    write_images(tmp_path / "suite" / "pets")
    (tmp_path / "suite/pets/test/cow").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "suite/pets/test/cow/0.png")
    with pytest.raises(ValueError, match="classes of test in train too, but lacks 'cow'"):
        load_suite(str(tmp_path / "suite"))


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="but holds neither"):
        load_suite(str(tmp_path))


def test_a_task_given_twice_is_refused(tmp_path):
    write_images(tmp_path / "own")
    np.savez(tmp_path / "own.npz", **one_layout())
    with pytest.raises(ValueError, match="has 'own' as npz and folder"):
        load_suite(str(tmp_path))
