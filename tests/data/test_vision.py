"""Each vision task is read from a fake of the tree that its source leaves on disk."""

import csv
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mergekit_lit.data import class_names
from mergekit_lit.data.decoding import square
from mergekit_lit.data.sources import _index, _Rows
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite

NO_CARVING = SplitOptions(val_share=0, reserve=0)


@pytest.fixture(autouse=True)
def _trust_fakes(monkeypatch):
    """Let torchvision read fakes whose checksums are not the official ones."""
    import torchvision.datasets as sets

    for module in ("flowers102", "fer2013", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", _exists)
    for name in ("CIFAR10", "SVHN", "STL10"):
        monkeypatch.setattr(getattr(sets, name), "_check_integrity", lambda _: True)
    monkeypatch.setattr(sets.CIFAR10, "_load_meta", _load_cifar_meta)


def _exists(path, md5=None):
    del md5
    from pathlib import Path

    return Path(path).is_file()


def _load_cifar_meta(self):
    with open(f"{self.root}/{self.base_folder}/{self.meta['filename']}", "rb") as file:  # noqa: PTH123
        self.classes = pickle.load(file, encoding="latin1")[self.meta["key"]]


def colour(label, index):
    """Return the colour of an image, which tells its label and number."""
    return (label % 256, index, 200)


def write_image(path, label, index, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    # BMP under any suffix: lossless, so that the colour can be read back.
    Image.new("RGB", size, colour(label, index)).save(path, "BMP")


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
    def write(root):
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


def cars_tree(root):
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([f"car {i}" for i in range(196)], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, count, path in (
        ("train", 4, folder / "devkit" / "cars_train_annos.mat"),
        ("test", 2, folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = np.zeros(count, dtype=[("fname", object), ("class", object)])
        for i in range(count):
            rows[i] = (f"{i}.jpg", 196 - i)
            write_image(folder / f"cars_{part}" / f"{i}.jpg", 195 - i, i)
        savemat(path, {"annotations": rows})


def dtd_tree(root):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    names = [f"texture{i:02}" for i in range(47)]
    for number, part in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(names):
            write_image(folder / "images" / name / f"{part}.jpg", label, number)
            lines.append(f"{name}/{part}.jpg")
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(lines))


def eurosat_tree(root):
    for label in range(10):
        for i in range(20):
            write_image(root / "eurosat/2750" / f"land{label}" / f"{i:02}.jpg", label, i)


def gtsrb_tree(root):
    rows = []
    for label in range(43):
        write_image(root / "gtsrb/GTSRB/Training" / f"{label:05}" / "0.ppm", label, 0)
        write_image(root / "gtsrb/GTSRB/Final_Test/Images" / f"{42 - label:05}.ppm", label, 1)
        rows.append({"Filename": f"{42 - label:05}.ppm", "ClassId": label})
    with (root / "gtsrb" / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def resisc45_tree(root):
    folder = root / "resisc45"
    for number, part in enumerate(("train", "test", "val")):
        names = [f"{name}_{number:03}.jpg" for name in class_names.RESISC45]
        for label, name in enumerate(names):
            path = folder / "NWPU-RESISC45" / class_names.RESISC45[label] / name
            write_image(path, label, number)
        (folder / f"resisc45-{part}.txt").write_text("\n".join(reversed(names)))


def sun397_tree(root):
    folder = root / "SUN397"
    paths = [f"/{'abc'[i % 3]}/scene{i:03}" for i in range(396)] + ["/b/bar/outdoor"]
    folder.mkdir()
    (folder / "ClassName.txt").write_text("\n".join(paths) + "\n")
    for number, name in enumerate(("Training_01.txt", "Testing_01.txt")):
        lines = [f"{path}/sun_{number}.jpg" for path in (paths[0], paths[1], paths[396])]
        for label, line in zip((0, 1, 396), lines, strict=True):
            write_image(folder / line[1:], label, number)
        write_image(folder / paths[0][1:] / "sun_unlisted.jpg", 0, 99)
        (folder / name).write_text("\n".join(lines) + "\n")


def svhn_tree(root):
    from scipy.io import savemat

    for part, count in (("train", 20), ("test", 10)):
        digits = np.arange(count) % 10
        x = np.zeros((32, 32, 3, count), np.uint8)
        x[..., 0, :], x[..., 1, :] = digits, np.arange(count)
        x[..., 2, :] = 200
        # The files call the digit 0 class 10.
        y = np.where(digits == 0, 10, digits)[:, None]
        savemat(root / f"{part}_32x32.mat", {"X": x, "y": y})


def stl10_tree(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"thing{i}" for i in range(10)))
    for part in ("train", "test"):
        x = np.zeros((10, 3, 96, 96), np.uint8)
        for i in range(10):
            x[i] = np.array(colour(i, i), np.uint8)[:, None, None]
        # Columns first on disk.
        x.swapaxes(2, 3).tofile(folder / f"{part}_X.bin")
        (np.arange(10, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")


def pets_tree(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for number, part in enumerate(("trainval", "test")):
        lines = []
        for label in range(37):
            write_image(folder / "images" / f"pet_{label:02}_{number}.jpg", label, number)
            lines.append(f"pet_{label:02}_{number} {label + 1} 1 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def flowers_tree(root):
    from scipy.io import savemat

    folder = root / "flowers-102"
    ids = np.arange(1, 103 * 3 - 2).reshape(102, 3)
    for label, row in enumerate(ids):
        for number, image in enumerate(row):
            write_image(folder / "jpg" / f"image_{image:05}.jpg", label, number)
    savemat(folder / "setid.mat", {"trnid": ids[:, 0], "valid": ids[:, 1], "tstid": ids[:, 2]})
    savemat(folder / "imagelabels.mat", {"labels": np.repeat(np.arange(1, 103), 3)})


def cifar_tree(folder, files, meta, key, names_key, classes):
    def write(root):
        (root / folder).mkdir()
        for path in files:
            x = np.zeros((classes, 3, 32, 32), np.uint8)
            for i in range(classes):
                x[i] = np.array(colour(i, i), np.uint8)[:, None, None]
            batch = {"data": x.reshape(classes, -1), key: list(range(classes))}
            (root / folder / path).write_bytes(pickle.dumps(batch))
        names = {names_key: [f"thing{i}" for i in range(classes)]}
        (root / folder / meta).write_bytes(pickle.dumps(names))

    return write


def pcam_tree(root):
    import h5py

    (root / "pcam").mkdir()
    for part in ("train", "test", "valid"):
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{part}"
        x = np.zeros((4, 96, 96, 3), np.uint8)
        for i in range(4):
            x[i] = colour(i % 2, i)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = x
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(4) % 2).astype(np.uint8).reshape(4, 1, 1, 1)


def fer2013_tree(root):
    (root / "fer2013").mkdir()
    with (root / "fer2013" / "fer2013.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for label in range(7):
            for usage in ("Training", "PublicTest", "PrivateTest"):
                writer.writerow([label, " ".join([str(label)] * 48 * 48), usage])


def food_tree(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        listed = {f"dish{i:03}": [f"dish{i:03}/{number}"] for i in reversed(range(101))}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for label in range(101):
            write_image(folder / "images" / f"dish{label:03}" / f"{number}.jpg", label, number)


def sst2_tree(root):
    for number, part in enumerate(("train", "valid", "test")):
        for label, name in enumerate(("negative", "positive")):
            for i in range(3):
                path = root / "rendered-sst2" / part / name / f"{i}.png"
                write_image(path, label, 10 * number + i)


CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]

# Task -> its tree, images in train and test, class names at both ends.
TREES = {
    "cars": (cars_tree, 4, 2, ("car 0", "car 195")),
    "dtd": (dtd_tree, 94, 47, ("texture00", "texture46")),
    "eurosat": (eurosat_tree, 160, 20, ("land0", "land9")),
    "gtsrb": (gtsrb_tree, 43, 43, ("speed limit 20 km/h", class_names.GTSRB[42])),
    "mnist": (mnist_tree("MNIST"), 20, 10, ("0 - zero", "9 - nine")),
    "resisc45": (resisc45_tree, 45, 45, ("airplane", "wetland")),
    "sun397": (sun397_tree, 3, 3, ("scene000", "bar/outdoor")),
    "svhn": (svhn_tree, 20, 10, ("0", "9")),
    "stl10": (stl10_tree, 10, 10, ("thing0", "thing9")),
    "oxford_pets": (pets_tree, 37, 37, ("Pet 00", "Pet 36")),
    "flowers102": (flowers_tree, 102, 102, ("pink primrose", "blackberry lily")),
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
    "food101": (food_tree, 101, 101, ("dish000", "dish100")),
    "fashion_mnist": (mnist_tree("FashionMNIST"), 20, 10, ("T-shirt/top", "Ankle boot")),
    "rendered_sst2": (sst2_tree, 6, 6, ("negative", "positive")),
    "emnist_digits": (emnist_tree("digits"), 20, 10, ("0", "9")),
    "kmnist": (mnist_tree("KMNIST"), 20, 10, ("o", "wo")),
    "emnist_letters": (emnist_tree("letters", first=1, classes=26), 52, 26, ("a", "z")),
}
# Small, to be fast; sets that are arrays already keep their size.
DECODED = 48
ARRAYS = ("mnist", "fashion_mnist", "kmnist", "emnist_digits", "emnist_letters")


def find(name):
    suite = "paper20" if name == "emnist_letters" else "vision20"
    return load_suite(suite).task(name)


@pytest.mark.parametrize("name", TREES)
def test_a_task_is_read_from_its_tree(tmp_path, name):
    write, train, test, ends = TREES[name]
    task = find(name)
    assert not task.present(tmp_path)
    write(tmp_path)
    assert task.present(tmp_path)
    data = task.load(NO_CARVING, tmp_path, size=DECODED)
    assert (len(data.train), len(data.test)) == (train, test)
    assert (data.classes[0], data.classes[-1]) == ends
    assert len(data.classes) == task.classes
    side = task.image_size if name in (*ARRAYS, "stl10") else min(DECODED, task.image_size)
    for images in (data.train, data.test):
        assert images.x.dtype == np.uint8
        assert images.x.shape[1:] == (side, side, 3)
        _check_labels(name, images)


def _check_labels(name, images):
    """Compare each label with what the image shows."""
    x = np.asarray(images.x)
    if name in ARRAYS:
        # Row 3, column 5: an EMNIST image that is still transposed has it in row 5, column 3.
        first = 1 if name == "emnist_letters" else 0
        shown = x[:, 3, 5, 0].astype(int) - 1 - first
        assert (np.count_nonzero(x[..., 0].reshape(len(x), -1), axis=1) == 1).all()
    else:
        shown = x[:, 1, 1, 0].astype(int)
    if name == "sun397":
        shown = np.where(shown == 396 % 256, 396, shown)
    np.testing.assert_array_equal(images.y, shown)


def test_the_suites_hold_the_tasks_in_the_papers_order():
    assert load_suite("vision8").names == load_suite("vision20").names[:8]
    assert load_suite("vision14").names == load_suite("vision20").names[:14]
    assert load_suite("paper8").names == load_suite("paper20").names[:8]
    assert load_suite("paper8").names[:3] == ("sun397", "cars", "resisc45")
    assert set(load_suite("vision20").names) ^ set(load_suite("paper20").names) == {
        "emnist_digits",
        "emnist_letters",
    }
    assert {task.name for task in load_suite("vision20").tasks} < set(TREES)


def test_official_sizes_give_the_papers_validation_sizes():
    papers = {"cars": 814, "dtd": 376, "flowers102": 102, "fer2013": 2870, "pcam": 5000}
    for name, val in papers.items():
        assert min(5000, int(0.1 * find(name).train)) == val


def test_eurosat_is_split_in_three_by_a_fixed_seed(tmp_path):
    eurosat_tree(tmp_path)
    data, again = (find("eurosat").load(SplitOptions(seed=s, reserve=8), tmp_path) for s in (0, 1))
    assert (len(data.train), len(data.val), len(data.test)) == (152, 20, 20)
    assert np.bincount(data.test.y).tolist() == np.bincount(data.val.y).tolist() == [2] * 10
    np.testing.assert_array_equal(data.test.x, again.test.x)
    np.testing.assert_array_equal(data.val.x, again.val.x)
    seen = [
        {tuple(pixel) for pixel in images.x[:, 0, 0]}
        for images in (data.train, data.reserve, data.val, data.test)
    ]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 200


def test_unused_official_parts_are_left_out(tmp_path):
    for write in (flowers_tree, sst2_tree, sun397_tree):
        write(tmp_path)
    # Images of the official val parts are numbered 1 (flowers) and 10 to 12 (SST2).
    flowers = find("flowers102").load(NO_CARVING, tmp_path, size=8)
    assert set(flowers.train.x[:, 0, 0, 1].tolist()) == {0}
    assert set(flowers.test.x[:, 0, 0, 1].tolist()) == {2}
    sst2 = find("rendered_sst2").load(NO_CARVING, tmp_path, size=8)
    assert set(sst2.train.x[:, 0, 0, 1].tolist()) == {0, 1, 2}
    assert set(sst2.test.x[:, 0, 0, 1].tolist()) == {20, 21, 22}
    sun = find("sun397").load(NO_CARVING, tmp_path)
    assert 99 not in sun.train.x[:, 0, 0, 1]


def test_images_can_be_decoded_smaller_but_not_larger(tmp_path):
    sst2_tree(tmp_path)
    for size, side in ((None, 224), (32, 32), (500, 224)):
        data = find("rendered_sst2").load(NO_CARVING, tmp_path, size=size)
        assert data.train.x.shape == (6, side, side, 3)


def test_fer2013_folders_get_the_labels_of_the_csv(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(class_names.FER2013):
            write_image(tmp_path / "fer2013" / part / name / "0.jpg", label, 0)
    data = find("fer2013").load(NO_CARVING, tmp_path)
    _check_labels("fer2013", data.train)
    assert data.classes[6] == "neutral"


def test_fer2013_without_test_labels_is_refused(tmp_path):
    (tmp_path / "fer2013").mkdir()
    pixels = " ".join(["1"] * 48 * 48)
    (tmp_path / "fer2013" / "train.csv").write_text(f"emotion,pixels\n0,{pixels}\n")
    (tmp_path / "fer2013" / "test.csv").write_text(f"pixels\n{pixels}\n")
    with pytest.raises(ValueError, match="labelled test images"):
        find("fer2013").load(NO_CARVING, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cars", "resisc45", "fer2013"])
def test_hugging_face_copies_get_our_labels(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    ours = {
        "cars": tuple(f"car {i}" for i in range(196)),
        "resisc45": class_names.RESISC45,
        "fer2013": class_names.FER2013,
    }[name]
    # Their order is another: reversed, or that of folders without saying so.
    theirs = {"cars": ours, "fer2013": class_names.FER2013_FOLDERS}.get(name, ours[::-1])
    shown = [ours.index(label) for label in theirs]
    image = [Image.new("RGB", (8, 8), colour(label, 0)) for label in shown]
    label = datasets.Value("int64")
    if name != "fer2013":
        label = datasets.ClassLabel(names=[text.replace("_", " ") for text in theirs])
    key = "cls" if name == "fer2013" else "label"
    features = datasets.Features({"image": datasets.Image(), key: label})
    part = datasets.Dataset.from_dict(
        {"image": image, key: list(range(len(theirs)))}, features=features
    )
    path = tmp_path / "huggingface" / name
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(path))
    assert find(name).present(tmp_path)
    data = find(name).load(NO_CARVING, tmp_path)
    assert data.classes == ours
    _check_labels(name, data.train)


def test_rows_and_spellings_are_mapped_to_our_labels():
    rows = [{"image": Image.new("L", (4, 4)), "label": 1}]
    assert _Rows(rows, "image", "label", (5, 3))[0][1] == 3
    assert _index("Ground Track Field", class_names.RESISC45) == 16
    assert _index("surprised", class_names.FER2013) == 5
    with pytest.raises(ValueError, match=r"A class must be one of .* but is 'cat'"):
        _index("cat", class_names.FER2013)


def test_class_names_are_complete():
    lists = (class_names.GTSRB, class_names.RESISC45, class_names.FER2013, class_names.PCAM)
    assert [len(set(names)) for names in lists] == [43, 45, 7, 2]
    assert list(class_names.RESISC45) == sorted(class_names.RESISC45)


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'mnist' must lie under .*download=True"):
        find("mnist").load(root=tmp_path)
    with pytest.raises(FileNotFoundError, match="Put the images and the lists"):
        find("sun397").load(root=tmp_path)


def test_sun397_without_lists_is_refused(tmp_path):
    sun397_tree(tmp_path)
    (tmp_path / "SUN397" / "Testing_01.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold 'Testing_01.txt'"):
        find("sun397").load(root=tmp_path)


def test_damaged_official_files_are_one_line(tmp_path, monkeypatch):
    import torchvision.datasets as sets

    monkeypatch.setattr(sets.STL10, "_check_integrity", lambda _: False)
    stl10_tree(tmp_path)
    with pytest.raises(ValueError, match=r"'stl10' must lie whole under .* corrupted") as caught:
        find("stl10").load(root=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_default_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_LIT_DATA", str(tmp_path))
    assert not find("kmnist").present()
    mnist_tree("KMNIST")(tmp_path)
    assert find("kmnist").present()


def test_square_resizes_the_shorter_side_and_crops_the_centre():
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    assert square(image, 10).shape == (10, 10, 3)
    assert square(image, 10)[:, 1:-1].min() == 255
