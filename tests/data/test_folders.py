"""The user's own folders of images, and one clear line for bad input."""

import numpy as np
import pytest
from PIL import Image

from mergekit_lit.data.decoding import Files
from mergekit_lit.data.keeping import fingerprint
from mergekit_lit.data.listing import check_data, tasks_table
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite


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
    monkeypatch.setattr("mergekit_lit.data.keeping.LARGE", 1000)
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
        load_suite(str(tmp_path / "suite")).task("pets").pool()


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="but holds neither"):
        load_suite(str(tmp_path))


def test_a_task_given_twice_is_refused(tmp_path):
    write_images(tmp_path / "own")
    members = {"x": np.zeros((4, 8, 8), np.uint8), "y": [0, 1, 0, 1], "split": [0, 0, 1, 1]}
    np.savez(tmp_path / "own.npz", **members, classes=["a", "b"])
    with pytest.raises(ValueError, match="has 'own' as npz and folder"):
        load_suite(str(tmp_path)).task("own").pool()


def test_a_damaged_task_is_listed_and_refused_and_the_others_work(tmp_path):
    write_images(tmp_path / "good")
    write_images(tmp_path / "bad")
    (tmp_path / "bad/test/cow").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bad/test/cow/0.png")
    (tmp_path / "worse.npz").write_bytes(b"PK")
    (tmp_path / "shut.npz").symlink_to("nowhere.npz")
    suite = load_suite(str(tmp_path), root=tmp_path / "root")
    assert suite.names == ("bad", "good", "shut", "worse")
    assert [bool(task.damage) for task in suite.tasks] == [True, False, True, True]
    assert len(suite.task("good").pool().train) == 12
    assert suite.chosen(["good"]) == ("good",)
    for name, message in (("bad", "lacks 'cow'"), ("worse", "worse.npz"), ("shut", "shut.npz")):
        for refused in (suite.task(name).pool, lambda name=name: suite.chosen(["good", name])):
            with pytest.raises(ValueError, match=message) as caught:
                refused()
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lacks 'cow'"):
        suite.chosen()
    rows = {row["name"]: row for row in tasks_table(str(tmp_path))}
    assert rows["good"]["damage"] == ""
    assert "worse.npz" in rows["worse"]["damage"]


def test_no_name_is_no_folder():
    with pytest.raises(KeyError, match="No suite named ''"):
        load_suite("")


@pytest.mark.parametrize("size", [0, -5])
def test_a_size_below_one_pixel_is_refused(tmp_path, size):
    write_images(tmp_path / "suite" / "pets")
    task = load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets")
    with pytest.raises(ValueError, match=f"`size` must be at least 1 pixel, but is {size}"):
        task.load(size=size)


def test_grey_images_of_16_bits_keep_their_high_bytes(tmp_path):
    folder = tmp_path / "suite" / "pets"
    write_images(folder)
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(folder / "train" / "cat" / "0.png")
    pool = load_suite(str(tmp_path / "suite"), root=tmp_path).task("pets").pool()
    np.testing.assert_array_equal(pool.train.x[0], np.repeat(levels[..., None] // 256, 3, axis=2))


def test_links_in_circles_and_to_nothing_are_passed_or_named(tmp_path):
    folder = tmp_path / "suite" / "pets"
    write_images(folder)
    (folder / "train" / "cat" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "train" / "cat" / "self.txt").symlink_to("self.txt")
    task = load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets")
    assert len(task.pool().train) == 12
    (folder / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"gone.png' must") as caught:
        load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets").pool()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("linked", ["", "train", "train/cat", "train/cat/0.png"])
def test_what_changes_behind_a_link_is_decoded_again(tmp_path, linked):
    write_images(tmp_path / "elsewhere")
    (tmp_path / "suite").mkdir()
    link, target = tmp_path / "suite" / "pets" / linked, tmp_path / "elsewhere" / linked
    if linked:
        write_images(tmp_path / "suite" / "pets")
        link.rename(tmp_path / "unlinked")
    link.symlink_to(target)
    task = load_suite(str(tmp_path / "suite"), root=tmp_path / "root").task("pets")
    assert task.pool().train.x[0, 0, 0].tolist() == [0, 0, 7]
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "elsewhere/train/cat/0.png")
    assert task.pool().train.x[0, 0, 0].tolist() == [9, 9, 9]


def test_a_fingerprint_follows_links_and_ends_where_they_run_in_circles(tmp_path):
    folders = [tmp_path / "set" / str(i) for i in range(12)]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"a")
    for folder in folders:
        folder.mkdir(parents=True)
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other, target_is_directory=True)
    (folders[0] / "images").symlink_to(tmp_path / "images", target_is_directory=True)
    before = fingerprint(tmp_path / "set")
    assert fingerprint(tmp_path / "set") == before
    (tmp_path / "images" / "0.png").write_bytes(b"ab")
    assert fingerprint(tmp_path / "set") != before


def test_labels_and_order_are_part_of_what_is_kept(tmp_path):
    paths = [tmp_path / name for name in ("0.png", "1.png")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    listed = [Files(paths, [0, 1]), Files(paths, [1, 0]), Files(paths[::-1], [0, 1])]
    assert len({files.content(tmp_path) for files in listed}) == 3


def test_hidden_names_are_no_data(tmp_path):
    folder = tmp_path / "suite" / "pets"
    write_images(folder)
    write_images(tmp_path / "suite" / ".trash")
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (8, 8)).save(folder / part / ".ipynb_checkpoints" / "0.png")
        (folder / part / "cat" / "._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "suite" / "._pets.npz").write_bytes(b"Mac OS X")
    suite = load_suite(str(tmp_path / "suite"), root=tmp_path / "root")
    assert suite.names == ("pets",)
    assert not suite.task("pets").damage
    pool = suite.task("pets").pool()
    assert (pool.classes, len(pool.train), len(pool.test)) == (("cat", "dog"), 12, 4)


def test_a_class_without_training_images_is_named_with_its_remedy(tmp_path):
    write_images(tmp_path / "pets")
    (tmp_path / "pets/train/cow").mkdir()
    (tmp_path / "pets/train/cow/notes.txt").write_text("moo")
    told = r"Task 'pets' .* has none of 'cow'. Put images into '.*pets/train/cow', or remove"
    with pytest.raises(ValueError, match=told):
        load_suite(str(tmp_path)).task("pets").pool()
    (row,) = check_data(str(tmp_path))
    assert row["status"] == "broken"
    assert "has none of 'cow'. Put images into" in row["what"]
    assert row["mend"] == "Mend it as told, or remove it."


def test_images_of_floats_are_named(tmp_path):
    folder = tmp_path / "suite" / "pets"
    write_images(folder)
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "train" / "cat" / "7.tif")
    task = load_suite(str(tmp_path / "suite"), root=tmp_path).task("pets")
    with pytest.raises(ValueError, match=r"7.tif' must be a whole image, but is not: its pixels"):
        task.pool()
