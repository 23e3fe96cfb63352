"""The section of bounds: figures that are drawn to scale, tables, and what is unknown."""

import re
import xml.etree.ElementTree as ET

import pytest

from mergekit_lit.core.records import Record
from mergekit_lit.reports.bounds import along_panel, bounds_section, losses_panel, stacked_panel

PARTS = ("progress", "drift", "generalization")


def make_bound(name, values, *, losses=True):
    terms = {
        part: {
            "name": part,
            "value": value,
            "provenance": "unknown" if value is None else "measured",
            "note": "",
        }
        for part, value in zip(PARTS, values, strict=True)
    }
    measured = {"base_loss": 1.4, "train_loss": 1.0, "test_loss": 1.5, "gap": 0.5}
    return Record(
        stage="bound",
        name=name,
        config={"experts": []},
        metrics={
            "bound": {
                "terms": terms,
                "parts": list(PARTS),
                "total": None if None in values else sum(values),
                "weighing": {"chi2_lambda": 0.0, "chi2_w": None},
                "violated": ["eta L = 3 exceeds 2: a <b>."],
                "effective": False,
            },
            "experts": [{"task": "a", "coefficient": 0.5, **(measured if losses else {})}],
            "signatures": ["Diverse tasks: so it is."],
        },
    )


def bars(svg):
    root = ET.fromstring(svg)
    return [(r.get("class"), float(r.get("x")), float(r.get("width"))) for r in root.iter("rect")]


def test_bars_stand_end_to_end_and_to_scale():
    drawn = bars(stacked_panel([make_bound("one", (1.0, 3.0, 0.5))]))
    (_, zero, first), (_, second, longer), (_, third, short) = drawn
    assert (longer / first, short / first) == pytest.approx((3.0, 0.5), rel=1e-2)
    assert (second, third) == pytest.approx((zero + first, second + longer), abs=0.02)


def test_terms_below_zero_stand_left_of_the_others():
    drawn = bars(stacked_panel([make_bound("one", (-1.0, 3.0, 0.5))]))
    (_, left, width), (_, right, _), _ = drawn
    assert left + width == pytest.approx(right, abs=0.02)


def test_what_is_unknown_has_no_bar_and_is_named():
    svg = stacked_panel([make_bound("one", (1.0, 3.0, None)), make_bound("two", (1.0, 1.0, 1.0))])
    assert len(bars(svg)) == 5
    assert "no total: generalization" in svg
    other = make_bound("ties", (None, None, 0.5))
    for part in PARTS[:2]:
        other.metrics["bound"]["terms"][part]["note"] = "no sum of scaled deltas"
    assert "no total: no sum of scaled deltas" in stacked_panel([other])


def test_losses_are_drawn_where_they_were_measured():
    svg = losses_panel([make_bound("one", (1.0, 1.0, 1.0))])
    assert "+0.5" in svg
    assert "training 1, test 1.5" in svg
    assert losses_panel([make_bound("one", (1.0, 1.0, 1.0), losses=False)]) == ""


def test_terms_along_training_are_drawn_by_their_logarithm():
    svg = along_panel("digits", {"drift": [(1, 0.01), (2, 0.1), (3, 1.0), (4, 0.0)]})
    points = re.search(r'<polyline points="([^"]+)"', svg).group(1).split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)


def test_the_section_holds_tables_sentences_and_figures():
    records = [make_bound("one", (1.0, 3.0, None)), Record(stage="merge", name="m", config={})]
    curves = {
        "digits": {"bound/drift": [(1, 0.1), (2, 0.2)], "loss": [(1, 3.0)]},
        "letters": {"bound/drift": [(1, 0.0)]},
    }
    text = bounds_section(records, curves)
    assert text.count("<svg") == 3
    assert "one: eta L = 3 exceeds 2: a &lt;b&gt;." in text
    assert "one: Diverse tasks" in text
    assert text.count("<table") == 2
    assert bounds_section(records[1:], {}) == ""
