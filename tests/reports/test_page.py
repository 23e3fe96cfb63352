import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from mergekit_lit.reports import figures, tables
from mergekit_lit.reports.page import MEANINGS, report_page
from mergekit_lit.reports.runs import read_run
from mergekit_lit.reports.svg import Scale
from mergekit_lit.stages.report import build_report


class Tags(HTMLParser):
    """Checks that every element closes, and collects attributes that could load something."""

    VOID = ("meta", "br", "circle", "line", "rect", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.counts = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [v for k, v in attrs if k in ("src", "href", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_page_is_whole_self_contained_and_small(run_folder):
    path = build_report(run_folder)
    page = path.read_text("utf-8")
    tags = parsed(page)
    assert tags.loads == []
    assert re.findall(r"(?:https?:)?//[a-z]|@import|url\(", page) == []
    assert "default-src 'none'" in page
    assert len(page.encode()) < 2_000_000
    # The mean and three tasks, one coefficient curve, two maps, three training panels.
    assert tags.counts["svg"] == 4 + 1 + 2 + 3
    assert "less where they agree, more where they undo" in page


def test_page_holds_every_number_and_its_provenance(run_folder):
    page = report_page(read_run(run_folder), title="A title")
    for text in ("0.300", "[0.450, 0.550]", "unlabelled TEST images", "abc123", "seed 3"):
        assert text in page
    assert "deltas differ in length" in page
    assert "The merge lies between the base and its experts" in page
    assert all(f"<dt>{term}</dt>" in page for term in MEANINGS)


def test_names_are_escaped_everywhere(run_folder):
    page = report_page(read_run(run_folder), title="<script>alert(1)</script>")
    assert "<b>odd" not in page
    assert "<script>alert" not in page
    parsed(page)


def test_same_folder_same_bytes(run_folder):
    first = build_report(run_folder).read_bytes()
    assert build_report(run_folder).read_bytes() == first


def test_training_alone_makes_a_page(run_folder):
    (run_folder / "evaluation.record.json").unlink()
    page = build_report(run_folder, title="only training").read_text("utf-8")
    assert "Training of the experts" in page
    assert "Accuracy on" not in page


@pytest.mark.parametrize("count", [1, 2, 20])
def test_cosine_map_of_any_size_is_valid(count):
    names = [f"t{index}" for index in range(count)]
    cosine = [[1.0 if i == j else -0.001 for j in range(count)] for i in range(count)]
    root = ET.fromstring(figures.cosine_figure(names, cosine))
    texts = [node.text for node in root.iter("text")]
    assert len(list(root.iter("rect"))) == count**2
    assert texts.count("-0.00") == 0
    assert texts.count("0.00") == (count**2 - count if count <= 12 else 0)


def test_conflict_map_is_coloured_by_the_distance_from_chance():
    conflict = [[0.0, 0.4, 0.55], [0.4, 0.0, None], [0.55, None, 0.0]]
    root = ET.fromstring(figures.conflict_figure(["a", "b", "c"], conflict))
    classes = [node.get("class") for node in root.iter("rect")]
    assert classes[1] == "cell positive"
    assert classes[2] == "cell negative"
    assert classes[0] == classes[4] == classes[5] == "cell own"
    depths = [float(node.get("fill-opacity") or 0) for node in root.iter("rect")]
    assert depths[1:3] == pytest.approx([1.0, 0.06 + 0.94 * 0.5])
    assert "b and a 0.400; c and a 0.550; c and b unknown" in root.get("aria-label")


def test_accuracy_panel_places_dots_by_value(evaluation):
    rows = list(tables.by_task(tables.scores(evaluation()), "digits").values())
    root = ET.fromstring(figures.accuracy_panel("digits", rows))
    across = [float(node.get("cx")) for node in root.iter("circle")]
    start, end = 140.0, 290.0
    expected = [start + row.accuracy * (end - start) for row in rows]
    assert across == pytest.approx(expected, abs=0.01)


def test_training_panel_without_gradient_says_so():
    text = figures.training_panel("x", [(0, 1.0), (10, 0.5)], [])
    assert "gradient norm not logged" in text
    assert "not logged" in text
    ET.fromstring(text)


def test_long_series_are_thinned_by_means():
    series = [(step, float(step % 2)) for step in range(10_000)]
    points = figures.thinned(series)
    assert len(points) <= 240
    assert all(value == pytest.approx(0.5, abs=0.02) for _, value in points)
    assert figures.thinned([(3, 1.0)]) == [(3.0, 1.0)]


def test_ticks_are_round_and_inside():
    assert Scale(0.0, 1.0, 0, 1).ticks(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert Scale(0.0, 199.0, 0, 1).ticks(4) == pytest.approx([0, 50, 100, 150])
    assert Scale(2.0, 2.0, 0, 1).ticks(4) == [2.0]
    assert Scale(0.0, 1.5, 10, 40)(0.5) == pytest.approx(20)
