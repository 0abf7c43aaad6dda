"""Names beside lines, and styles that tell series apart without colour."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.text import Text

from loopserve.bench.figures import figure, label_ends, per_cent, series_style


def test_series_are_distinguished_by_shape_as_well_as_by_colour() -> None:
    styles = [series_style(number) for number in range(13)]
    assert len({each["marker"] for each in styles}) == 13
    assert len({(each["color"], each["marker"], str(each["linestyle"])) for each in styles}) == 13
    assert all(each["markerfacecolor"] == "none" for each in styles), "a point under another one is seen"


def test_every_line_has_its_name_beside_its_end_and_no_two_names_overlap() -> None:
    drawn = figure(5, 4)
    axes = drawn.subplots()
    for number in range(12):
        axes.plot([0, 1], [0.0, 0.5 + 0.001 * number], **series_style(number), label=f"series {number}")
    axes.axhline(0.5, label="dense")
    axes.errorbar([0, 1], [0.2, 0.9], [0.1, 0.1], label="with errors")
    axes.plot([0, 1], [1, 0])
    per_cent(axes.yaxis)
    label_ends(axes)
    drawn.draw_without_rendering()
    assert {each.get_text() for each in axes.texts} == {*(f"series {n}" for n in range(12)), "dense", "with errors"}
    boxes = sorted((Text.get_window_extent(each) for each in axes.texts), key=lambda box: box.y0)
    right = axes.get_window_extent().x1
    assert all(box.x0 > right for box in boxes)
    assert all(low.y0 + 0.75 * low.height < high.y0 for low, high in pairwise(boxes))
    assert axes.get_yticklabels()[1].get_text().endswith(" %")


def test_what_is_written_fits_into_a_page_of_1280_pixels() -> None:
    from loopserve.bench.quality.page import score_by_cost

    rows = [
        {"position": place, "family": family, "score": 0.5, "score_se": 0.1, "attended_fraction": share}
        for place in ("begin", "middle", "end")
        for family in ("snapkv", "h2o")
        for share in (0.1, 0.2)
    ]
    drawn = score_by_cost(rows, "attended_fraction")
    assert drawn.get_size_inches()[0] * 100 < 1280 and len([each for each in drawn.axes if each.axison]) == 3
