"""What the tests of the vision tasks share: fakes of the trees that the sources leave on disk."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite

# Small, to be fast; sets that are arrays already keep their size.
DECODED = 48


class Fakes:
    """Makes fake images, and compares what is read with them."""

    no_carving = SplitOptions(val_share=0, reserve=0)
    # Sets of 28 x 28 digits, letters and clothes.
    stamps = ("mnist", "fashion_mnist", "kmnist", "emnist_digits", "emnist_letters")

    # Sets that their source holds as arrays; those of the other tasks are files.
    arrays = (*stamps, "svhn", "stl10", "cifar10", "cifar100", "pcam", "fer2013")

    @staticmethod
    def colour(label, index):
        """Return the colour of an image, which tells its label and number."""
        return (label % 256, index, 200)

    @classmethod
    def image(cls, path, label, index, size=(8, 8)):
        path.parent.mkdir(parents=True, exist_ok=True)
        # BMP under any suffix: lossless, so that the colour can be read back.
        Image.new("RGB", size, cls.colour(label, index)).save(path, "BMP")

    @staticmethod
    def task(name):
        suite = "paper20" if name == "emnist_letters" else "vision20"
        return load_suite(suite).task(name)

    @classmethod
    def check_tree(cls, root, name, tree):
        """Read a task from its tree, (writer, sizes, class names at both ends), and compare."""
        write, train, test, ends = tree
        task = cls.task(name)
        assert not task.present(root)
        write(root, cls)
        assert task.present(root)
        data = task.load(cls.no_carving, root, size=DECODED)
        assert (len(data.train), len(data.test)) == (train, test)
        assert (data.classes[0], data.classes[-1]) == ends
        assert len(data.classes) == task.classes
        as_they_are = (*cls.stamps, "stl10")
        side = task.image_size if name in as_they_are else min(DECODED, task.image_size)
        for images in (data.train, data.test):
            assert images.x.dtype == np.uint8
            assert images.x.shape[1:] == (side, side, 3)
            cls.check_labels(name, images)

    @classmethod
    def check_labels(cls, name, images):
        """Compare each label with what the image shows."""
        x = np.asarray(images.x)
        if name in cls.stamps:
            # Row 3, column 5: an EMNIST image that is still transposed has it in row 5, column 3.
            first = 1 if name == "emnist_letters" else 0
            shown = x[:, 3, 5, 0].astype(int) - 1 - first
            assert (np.count_nonzero(x[..., 0].reshape(len(x), -1), axis=1) == 1).all()
        else:
            shown = x[:, 1, 1, 0].astype(int)
        if name == "sun397":
            shown = np.where(shown == 396 % 256, 396, shown)
        np.testing.assert_array_equal(images.y, shown)


@pytest.fixture
def fakes(monkeypatch):
    """Fakes, which torchvision is let to read though their checksums are not the official ones."""
    import torchvision.datasets as sets

    for module in ("flowers102", "fer2013", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", _exists)
    for name in ("CIFAR10", "SVHN", "STL10"):
        monkeypatch.setattr(getattr(sets, name), "_check_integrity", lambda _: True)
    monkeypatch.setattr(sets.CIFAR10, "_load_meta", _load_cifar_meta)
    return Fakes


def _exists(path, md5=None):
    del md5
    return Path(path).is_file()


def _load_cifar_meta(self):
    path = Path(self.root, self.base_folder, self.meta["filename"])
    self.classes = pickle.loads(path.read_bytes(), encoding="latin1")[self.meta["key"]]
