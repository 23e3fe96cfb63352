"""Vision tasks whose source holds them as arrays, read from fakes of the trees on disk."""

import csv
import pickle

import numpy as np
import pytest

from mergekit_lit.data import class_names
from mergekit_lit.data.splits import Rows, SplitOptions


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(int(side).to_bytes(4, "big") for side in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def idx_images(labels):
    """Return 28 x 28 images: their label in row 3, column 5, and nothing else."""
    x = np.zeros((len(labels), 28, 28), np.uint8)
    x[:, 3, 5] = np.asarray(labels) + 1
    return x


def mnist_tree(folder, *, prefix=("train-", "t10k-"), transposed=False, first=0, classes=10):
    def write(root, _):
        for part, count in zip(prefix, (2, 1), strict=True):
            labels = np.repeat(np.arange(first, classes + first), count)
            x = idx_images(labels)
            write_idx(
                root / folder / "raw" / f"{part}images-idx3-ubyte",
                x.swapaxes(1, 2) if transposed else x,
            )
            write_idx(root / folder / "raw" / f"{part}labels-idx1-ubyte", labels)

    return write


def emnist_tree(split, *, first=0, classes=10):
    prefix = (f"emnist-{split}-train-", f"emnist-{split}-test-")
    return mnist_tree("EMNIST", prefix=prefix, transposed=True, first=first, classes=classes)


def svhn_tree(root, _):
    from scipy.io import savemat

    for part, count in (("train", 20), ("test", 10)):
        digits = np.arange(count) % 10
        x = np.zeros((32, 32, 3, count), np.uint8)
        x[..., 0, :], x[..., 1, :] = digits, np.arange(count)
        x[..., 2, :] = 200
        # The files call the digit 0 class 10.
        y = np.where(digits == 0, 10, digits)[:, None]
        savemat(root / f"{part}_32x32.mat", {"X": x, "y": y})


def stl10_tree(root, fakes):
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"thing{i}" for i in range(10)))
    for part in ("train", "test"):
        x = np.zeros((10, 3, 96, 96), np.uint8)
        for i in range(10):
            x[i] = np.array(fakes.colour(i, i), np.uint8)[:, None, None]
        # Columns first on disk.
        x.swapaxes(2, 3).tofile(folder / f"{part}_X.bin")
        (np.arange(10, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")


def cifar_tree(folder, files, meta, key, names_key, classes):
    def write(root, fakes):
        (root / folder).mkdir()
        for path in files:
            x = np.zeros((classes, 3, 32, 32), np.uint8)
            for i in range(classes):
                x[i] = np.array(fakes.colour(i, i), np.uint8)[:, None, None]
            batch = {"data": x.reshape(classes, -1), key: list(range(classes))}
            (root / folder / path).write_bytes(pickle.dumps(batch))
        names = {names_key: [f"thing{i}" for i in range(classes)]}
        (root / folder / meta).write_bytes(pickle.dumps(names))

    return write


def pcam_tree(root, fakes):
    import h5py

    (root / "pcam").mkdir()
    for part in ("train", "test", "valid"):
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{part}"
        x = np.zeros((4, 96, 96, 3), np.uint8)
        for i in range(4):
            x[i] = fakes.colour(i % 2, i)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = x
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(4) % 2).astype(np.uint8).reshape(4, 1, 1, 1)


def fer2013_tree(root, _):
    (root / "fer2013").mkdir()
    with (root / "fer2013" / "fer2013.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for label in range(7):
            for usage in ("Training", "PublicTest", "PrivateTest"):
                writer.writerow([label, " ".join([str(label)] * 48 * 48), usage])


CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]

# Task -> its tree, images in train and test, class names at both ends.
TREES = {
    "mnist": (mnist_tree("MNIST"), 20, 10, ("0 - zero", "9 - nine")),
    "svhn": (svhn_tree, 20, 10, ("0", "9")),
    "stl10": (stl10_tree, 10, 10, ("thing0", "thing9")),
    "cifar100": (
        cifar_tree(
            "cifar-100-python", ["train", "test"], "meta", "fine_labels", "fine_label_names", 100
        ),
        *(100, 100, ("thing0", "thing99")),
    ),
    "pcam": (pcam_tree, 4, 4, ("no tumour", "tumour")),
    "fer2013": (fer2013_tree, 7, 14, ("angry", "neutral")),
    "cifar10": (
        cifar_tree("cifar-10-batches-py", CIFAR10, "batches.meta", "labels", "label_names", 10),
        *(50, 10, ("thing0", "thing9")),
    ),
    "fashion_mnist": (mnist_tree("FashionMNIST"), 20, 10, ("T-shirt/top", "Ankle boot")),
    "emnist_digits": (emnist_tree("digits"), 20, 10, ("0", "9")),
    "kmnist": (mnist_tree("KMNIST"), 20, 10, ("o", "wo")),
    "emnist_letters": (emnist_tree("letters", first=1, classes=26), 52, 26, ("a", "z")),
}


def test_every_task_has_a_tree(fakes):
    assert set(TREES) == set(fakes.arrays)


@pytest.mark.parametrize("name", TREES)
def test_a_task_is_read_from_its_tree(tmp_path, name, fakes):
    fakes.check_tree(tmp_path, name, TREES[name])


@pytest.mark.parametrize("name", ["emnist_letters", "emnist_digits", "svhn"])
def test_large_arrays_are_mapped_and_hand_out_the_same_bytes(tmp_path, monkeypatch, name, fakes):
    TREES[name][0](tmp_path, fakes)
    options = SplitOptions(val_share=0.1, reserve=3)
    expected = fakes.task(name).load(options, tmp_path)
    assert not (tmp_path / "decoded").exists()
    monkeypatch.setattr("mergekit_lit.data.keeping.LARGE", 1000)
    for _ in range(2):
        data = fakes.task(name).load(options, tmp_path)
        assert isinstance(data.train.x, Rows)
        assert isinstance(data.train.x.store, np.memmap)
        assert data.split_hash == expected.split_hash
        for part in ("train", "val", "reserve", "test"):
            mapped, in_memory = getattr(data, part), getattr(expected, part)
            np.testing.assert_array_equal(np.asarray(mapped.x), in_memory.x)
            np.testing.assert_array_equal(mapped.y, in_memory.y)
    assert len(list((tmp_path / "decoded").iterdir())) == 2


def test_fer2013_folders_get_the_labels_of_the_csv(tmp_path, fakes):
    for part in ("train", "test"):
        for label, name in enumerate(class_names.FER2013):
            fakes.image(tmp_path / "fer2013" / part / name / "0.jpg", label, 0)
    data = fakes.task("fer2013").load(fakes.no_carving, tmp_path)
    fakes.check_labels("fer2013", data.train)
    assert data.classes[6] == "neutral"


def test_fer2013_without_test_labels_is_refused(tmp_path, fakes):
    (tmp_path / "fer2013").mkdir()
    pixels = " ".join(["1"] * 48 * 48)
    (tmp_path / "fer2013" / "train.csv").write_text(f"emotion,pixels\n0,{pixels}\n")
    (tmp_path / "fer2013" / "test.csv").write_text(f"pixels\n{pixels}\n")
    with pytest.raises(ValueError, match="labelled test images"):
        fakes.task("fer2013").load(fakes.no_carving, tmp_path)


def test_damaged_official_files_are_one_line(tmp_path, monkeypatch, fakes):
    import torchvision.datasets as sets

    monkeypatch.setattr(sets.STL10, "_check_integrity", lambda _: False)
    stl10_tree(tmp_path, fakes)
    with pytest.raises(ValueError, match=r"'stl10' must lie whole under .* corrupted") as caught:
        fakes.task("stl10").load(root=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_default_root_comes_from_the_environment(tmp_path, monkeypatch, fakes):
    monkeypatch.setenv("MERGEKIT_LIT_DATA", str(tmp_path))
    assert not fakes.task("kmnist").present()
    mnist_tree("KMNIST")(tmp_path, fakes)
    assert fakes.task("kmnist").present()


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08", b"\xff" * 40])
def test_damaged_arrays_are_one_line(tmp_path, fakes, content):
    mnist_tree("KMNIST")(tmp_path, fakes)
    (tmp_path / "KMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"'kmnist' must lie whole under") as caught:
        fakes.task("kmnist").load(root=tmp_path)
    assert "\n" not in str(caught.value)
