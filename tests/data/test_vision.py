"""The vision suites, their class names and copies on Hugging Face, and what is told of gaps."""

import pytest
from PIL import Image

from mergekit_lit.data import class_names
from mergekit_lit.data.decoding import square
from mergekit_lit.data.sources import _index, _Rows
from mergekit_lit.data.suites import load_suite


def test_the_suites_hold_the_tasks_in_the_papers_order():
    assert load_suite("vision8").names == load_suite("vision20").names[:8]
    assert load_suite("vision14").names == load_suite("vision20").names[:14]
    assert load_suite("paper8").names == load_suite("paper20").names[:8]
    assert load_suite("paper8").names[:3] == ("sun397", "cars", "resisc45")
    assert set(load_suite("vision20").names) ^ set(load_suite("paper20").names) == {
        "emnist_digits",
        "emnist_letters",
    }


def test_official_sizes_give_the_papers_validation_sizes(fakes):
    papers = {"cars": 814, "dtd": 376, "flowers102": 102, "fer2013": 2870, "pcam": 5000}
    for name, val in papers.items():
        assert min(5000, int(0.1 * fakes.task(name).train)) == val


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cars", "resisc45", "fer2013"])
def test_hugging_face_copies_get_our_labels(tmp_path, name, fakes):
    datasets = pytest.importorskip("datasets")
    ours = {
        "cars": tuple(f"car {i}" for i in range(196)),
        "resisc45": class_names.RESISC45,
        "fer2013": class_names.FER2013,
    }[name]
    # Their order is another: reversed, or that of folders without saying so.
    theirs = {"cars": ours, "fer2013": class_names.FER2013_FOLDERS}.get(name, ours[::-1])
    shown = [ours.index(label) for label in theirs]
    image = [Image.new("RGB", (8, 8), fakes.colour(label, 0)) for label in shown]
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
    assert fakes.task(name).present(tmp_path)
    data = fakes.task(name).load(fakes.no_carving, tmp_path)
    assert data.classes == ours
    fakes.check_labels(name, data.train)


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


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, fakes):
    with pytest.raises(
        FileNotFoundError, match=r"'mnist' must lie under .*--tasks mnist --download"
    ):
        fakes.task("mnist").load(root=tmp_path)
    with pytest.raises(FileNotFoundError, match="Put the images and the lists"):
        fakes.task("sun397").load(root=tmp_path)


def test_square_resizes_the_shorter_side_and_crops_the_centre():
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    assert square(image, 10).shape == (10, 10, 3)
    assert square(image, 10)[:, 1:-1].min() == 255
