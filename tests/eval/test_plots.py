"""The drawings put values where they belong."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from eval.plots import Axis, Mark, lines, pareto, scatter


def _mark(name: str, x: float, y: float) -> Mark:
    return Mark(name, "student", x, y, y - 0.01, y + 0.01)


def test_pareto_keeps_what_nothing_beats() -> None:
    """Dearer and worse, dearer and equal, and as dear and worse do not belong to the front."""
    marks = [_mark("a", 1, 0.5), _mark("b", 1.5, 0.5), _mark("c", 2, 0.7), _mark("d", 2, 0.6), _mark("e", 9, 0.65)]
    assert [mark.name for mark in pareto(marks)] == ["a", "c"]


def test_axes_map_ends_and_middles() -> None:
    """Half way is the arithmetic mean on a linear axis, the geometric one on a logarithmic one."""
    assert [Axis(0, 10, 100, 200).at(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert [Axis(1, 100, 0, 10, logarithmic=True).at(value) for value in (1, 10, 100)] == pytest.approx([0, 5, 10])


def test_ticks_are_round_and_inside() -> None:
    """Ticks must tell each other apart with as few digits as that takes."""
    assert [text for _, text in Axis(0.81, 0.87, 0, 1).ticks(5)] == ["0.82", "0.84", "0.86"]
    assert [text for _, text in Axis(0, 2000, 0, 1).ticks(4)] == ["0", "500", "1,000", "1,500", "2,000"]
    assert [text for _, text in Axis(0.3, 30, 0, 1, logarithmic=True).ticks(5)] == ["0.5", "1", "2", "5", "10", "20"]


def test_scatter_places_marks_and_escapes_names() -> None:
    """Better is higher, dearer is further right; a name is text and never markup."""
    drawing = scatter([_mark("cheap & <weak>", 1, 0.5), _mark("dear", 10, 0.8)], "ms", "nDCG@10", 800, 400)
    root = ET.fromstring(drawing)
    (x1, y1), (x2, y2) = ((float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle"))
    assert x1 < x2
    assert y1 > y2
    assert "cheap & <weak>" in {text.text for text in root.iter("text")}
    assert "dear 0.800 at 10 ms" in root.get("aria-label")


def test_labels_of_near_marks_do_not_cover_each_other() -> None:
    """Students of one size sit on one spot; their names must stay readable."""
    marks = [_mark(f"student number {number}", 5 + number / 100, 0.7 + number / 1000) for number in range(4)]
    root = ET.fromstring(scatter(marks, "ms", "nDCG@10", 800, 400))
    boxes = [(float(t.get("x")), float(t.get("y"))) for t in root.iter("text") if "label" in t.get("class", "")]
    assert len(boxes) == 4
    for i, (x1, y1) in enumerate(boxes):
        for x2, y2 in boxes[i + 1 :]:
            assert abs(y1 - y2) >= 11 or abs(x1 - x2) >= 100


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(5.0, 0.0), (6.0, 0.0)], [(1.0, -2.0), (2.0, 3.0)], [(1.0, 1e-9)]])
def test_lines_survive_degenerate_curves(points: list[tuple[float, float]]) -> None:
    """One point, a flat curve and zeros leave no range to divide by."""
    drawing = lines({"only": points}, "step", "loss", 400, 200)
    ET.fromstring(drawing)
    assert "nan" not in drawing
    assert not re.search(r"\binf", drawing)


def test_a_single_mark_can_be_drawn() -> None:
    """One timed system is the common first report."""
    drawing = scatter([Mark("one", "run", 3.0, 0.0, 0.0, 0.0)], "ms", "nDCG@10", 350, 300)
    ET.fromstring(drawing)
    assert "front" not in drawing
