"""Tests of sheets of curves: every point inside, nothing that a logarithm lacks, valid XML."""

import xml.etree.ElementTree as ET

from mergekit_lit.reports.curves import Plot, sheet

SVG = "{http://www.w3.org/2000/svg}"


def test_a_sheet_is_a_whole_file_with_every_point():
    plots = [
        Plot("a < b", "steps", {"x": [(10, 1.0), (100, 2.0)], "y": [(10, 3.0), (100, 0.5)]}),
        Plot("logarithmic", "steps", {"x": [(10, 1e-3), (100, 0.0), (800, 1.0)]}, log=True),
    ]
    root = ET.fromstring(sheet("all & every", plots))
    assert root.tag == f"{SVG}svg"
    first, second = root.findall(f"{SVG}g")
    # Four points and a mark in the key for each of two curves; two of three and one mark.
    assert len(first.findall(f"{SVG}circle")) == 6
    assert len(second.findall(f"{SVG}circle")) == 3
    for circle in first.findall(f"{SVG}circle"):
        assert 0 <= float(circle.get("cx")) <= 340
        assert 0 <= float(circle.get("cy")) <= 236


def test_a_plot_without_points_says_its_title_alone():
    root = ET.fromstring(sheet("none", [Plot("empty", "steps", {})]))
    (plot,) = root.findall(f"{SVG}g")
    assert [child.text for child in plot] == ["empty"]
