"""Vision tasks whose images are files, read from fakes of the trees on disk."""

import csv
import json

import numpy as np
import pytest

from mergekit_lit.data import class_names
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite


def cars_tree(root, fakes):
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
            fakes.image(folder / f"cars_{part}" / f"{i}.jpg", 195 - i, i)
        savemat(path, {"annotations": rows})


def dtd_tree(root, fakes):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    names = [f"texture{i:02}" for i in range(47)]
    for number, part in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(names):
            fakes.image(folder / "images" / name / f"{part}.jpg", label, number)
            lines.append(f"{name}/{part}.jpg")
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(lines))


def eurosat_tree(root, fakes):
    for label in range(10):
        for i in range(20):
            fakes.image(root / "eurosat/2750" / f"land{label}" / f"{i:02}.jpg", label, i)


def gtsrb_tree(root, fakes):
    rows = []
    for label in range(43):
        fakes.image(root / "gtsrb/GTSRB/Training" / f"{label:05}" / "0.ppm", label, 0)
        fakes.image(root / "gtsrb/GTSRB/Final_Test/Images" / f"{42 - label:05}.ppm", label, 1)
        rows.append({"Filename": f"{42 - label:05}.ppm", "ClassId": label})
    with (root / "gtsrb" / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def resisc45_tree(root, fakes):
    folder = root / "resisc45"
    for number, part in enumerate(("train", "test", "val")):
        names = [f"{name}_{number:03}.jpg" for name in class_names.RESISC45]
        for label, name in enumerate(names):
            path = folder / "NWPU-RESISC45" / class_names.RESISC45[label] / name
            fakes.image(path, label, number)
        (folder / f"resisc45-{part}.txt").write_text("\n".join(reversed(names)))


def sun397_tree(root, fakes):
    folder = root / "SUN397"
    paths = [f"/{'abc'[i % 3]}/scene{i:03}" for i in range(396)] + ["/b/bar/outdoor"]
    folder.mkdir()
    (folder / "ClassName.txt").write_text("\n".join(paths) + "\n")
    for number, name in enumerate(("Training_01.txt", "Testing_01.txt")):
        lines = [f"{path}/sun_{number}.jpg" for path in (paths[0], paths[1], paths[396])]
        for label, line in zip((0, 1, 396), lines, strict=True):
            fakes.image(folder / line[1:], label, number)
        fakes.image(folder / paths[0][1:] / "sun_unlisted.jpg", 0, 99)
        (folder / name).write_text("\n".join(lines) + "\n")


def pets_tree(root, fakes):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for number, part in enumerate(("trainval", "test")):
        lines = []
        for label in range(37):
            fakes.image(folder / "images" / f"pet_{label:02}_{number}.jpg", label, number)
            lines.append(f"pet_{label:02}_{number} {label + 1} 1 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def flowers_tree(root, fakes):
    from scipy.io import savemat

    folder = root / "flowers-102"
    ids = np.arange(1, 103 * 3 - 2).reshape(102, 3)
    for label, row in enumerate(ids):
        for number, image in enumerate(row):
            fakes.image(folder / "jpg" / f"image_{image:05}.jpg", label, number)
    savemat(folder / "setid.mat", {"trnid": ids[:, 0], "valid": ids[:, 1], "tstid": ids[:, 2]})
    savemat(folder / "imagelabels.mat", {"labels": np.repeat(np.arange(1, 103), 3)})


def food_tree(root, fakes):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        listed = {f"dish{i:03}": [f"dish{i:03}/{number}"] for i in reversed(range(101))}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for label in range(101):
            fakes.image(folder / "images" / f"dish{label:03}" / f"{number}.jpg", label, number)


def sst2_tree(root, fakes):
    for number, part in enumerate(("train", "valid", "test")):
        for label, name in enumerate(("negative", "positive")):
            for i in range(3):
                path = root / "rendered-sst2" / part / name / f"{i}.png"
                fakes.image(path, label, 10 * number + i)


# Task -> its tree, images in train and test, class names at both ends.
TREES = {
    "cars": (cars_tree, 4, 2, ("car 0", "car 195")),
    "dtd": (dtd_tree, 94, 47, ("texture00", "texture46")),
    "eurosat": (eurosat_tree, 160, 20, ("land0", "land9")),
    "gtsrb": (gtsrb_tree, 43, 43, ("speed limit 20 km/h", class_names.GTSRB[42])),
    "resisc45": (resisc45_tree, 45, 45, ("airplane", "wetland")),
    "sun397": (sun397_tree, 3, 3, ("scene000", "bar/outdoor")),
    "oxford_pets": (pets_tree, 37, 37, ("Pet 00", "Pet 36")),
    "flowers102": (flowers_tree, 102, 102, ("pink primrose", "blackberry lily")),
    "food101": (food_tree, 101, 101, ("dish000", "dish100")),
    "rendered_sst2": (sst2_tree, 6, 6, ("negative", "positive")),
}


def test_every_task_has_a_tree(fakes):
    assert set(TREES) == set(load_suite("vision20").names) - set(fakes.arrays)


@pytest.mark.parametrize("name", TREES)
def test_a_task_is_read_from_its_tree(tmp_path, name, fakes):
    fakes.check_tree(tmp_path, name, TREES[name])


def test_eurosat_is_split_in_three_by_a_fixed_seed(tmp_path, fakes):
    eurosat_tree(tmp_path, fakes)
    data, again = (
        fakes.task("eurosat").load(SplitOptions(seed=s, reserve=8), tmp_path) for s in (0, 1)
    )
    assert (len(data.train), len(data.val), len(data.test)) == (152, 20, 20)
    assert np.bincount(data.test.y).tolist() == np.bincount(data.val.y).tolist() == [2] * 10
    np.testing.assert_array_equal(data.test.x, again.test.x)
    np.testing.assert_array_equal(data.val.x, again.val.x)
    seen = [
        {tuple(pixel) for pixel in images.x[:, 0, 0]}
        for images in (data.train, data.reserve, data.val, data.test)
    ]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 200


def test_unused_official_parts_are_left_out(tmp_path, fakes):
    for write in (flowers_tree, sst2_tree, sun397_tree):
        write(tmp_path, fakes)
    # Images of the official val parts are numbered 1 (flowers) and 10 to 12 (SST2).
    flowers = fakes.task("flowers102").load(fakes.no_carving, tmp_path, size=8)
    assert set(flowers.train.x[:, 0, 0, 1].tolist()) == {0}
    assert set(flowers.test.x[:, 0, 0, 1].tolist()) == {2}
    sst2 = fakes.task("rendered_sst2").load(fakes.no_carving, tmp_path, size=8)
    assert set(sst2.train.x[:, 0, 0, 1].tolist()) == {0, 1, 2}
    assert set(sst2.test.x[:, 0, 0, 1].tolist()) == {20, 21, 22}
    sun = fakes.task("sun397").load(fakes.no_carving, tmp_path)
    assert 99 not in sun.train.x[:, 0, 0, 1]


def test_images_can_be_decoded_smaller_but_not_larger(tmp_path, fakes):
    sst2_tree(tmp_path, fakes)
    for size, side in ((None, 224), (32, 32), (500, 224)):
        data = fakes.task("rendered_sst2").load(fakes.no_carving, tmp_path, size=size)
        assert data.train.x.shape == (6, side, side, 3)


def test_sun397_without_lists_is_refused(tmp_path, fakes):
    sun397_tree(tmp_path, fakes)
    (tmp_path / "SUN397" / "Testing_01.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold 'Testing_01.txt'"):
        fakes.task("sun397").load(root=tmp_path)
