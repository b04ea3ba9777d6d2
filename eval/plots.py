"""Small plots as inline SVG: quality against cost, query by query, and training curves.

The drawing takes its colours from the page's style sheet, so it follows dark mode and print, and its
text stays text. Sizes are in CSS pixels; the page embeds one drawing for wide and one for narrow
screens instead of shrinking the letters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_SERIES_COLOURS = 6
_CHARACTER = 6.9  # mean width of a 12.5 px sans-serif letter


@dataclass(frozen=True)
class Mark:
    """One system in the scatter plot.

    Attributes:
        name: Its label.
        role: Chooses its colour.
        x: Cost, above 0.
        y: Quality.
        low: Lower end of the quality's interval.
        high: Upper end of it.
    """

    name: str
    role: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return about ``count`` round values inside the axis, each with its text."""
        if self.logarithmic:
            return [(value, f"{value:,.12g}") for value in _decade_ticks(self.low, self.high, count)]
        step = _round_step((self.high - self.low) / count)
        decimals = next((digits for digits in range(9) if math.isclose(round(step, digits), step)), 9)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, f"{index * step:,.{decimals}f}") for index in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other mark beats on cost without losing quality, cheapest first."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, -mark.y)):
        if not front or mark.y > front[-1].y:
            front.append(mark)
    return front


def scatter(marks: Sequence[Mark], x_label: str, y_label: str, width: int, height: int, unit: str = "ms") -> str:
    """Draw quality over cost (logarithmic) with intervals, and the Pareto front as a dashed line."""
    x_low, x_high = min(mark.x for mark in marks), max(mark.x for mark in marks)
    y_low, y_high = min(mark.low for mark in marks), max(mark.high for mark in marks)
    room = max(0.02, 0.12 * (y_high - y_low))
    x = Axis(x_low / 2, x_high * 2, 52, width - 12, logarithmic=True)
    y = Axis(max(0.0, y_low - room), min(1.0, y_high + room), height - 46, 12)
    front = pareto(marks)
    line = " ".join(f"{x.at(mark.x):.1f},{y.at(mark.y):.1f}" for mark in front)
    parts = [_frame(x, y, x_label, y_label, width, height)]
    if len(front) > 1:
        parts.append(f'<polyline class="front" points="{line}"/>')
    parts += [_drawn(mark, x, y) for mark in marks]
    parts += _labels(marks, x, y, width)
    names = ", ".join(f"{mark.name} {mark.y:.3f} at {mark.x:.3g} {unit}" for mark in sorted(marks, key=lambda m: m.x))
    return _svg(width, height, f"{y_label} against {x_label}", f"From cheapest to dearest: {names}.", parts)


def bubbles(
    points: Sequence[tuple[float, float]], x_label: str, y_label: str, width: int, height: int, role: str = "student"
) -> str:
    """Draw one circle for each pair of values, its area the number of queries that have it, over the diagonal."""
    counts = Counter((round(x, 3), round(y, 3)) for x, y in points)
    top = max(1.0, *(value for point in points for value in point))
    x, y = Axis(-0.04 * top, 1.04 * top, 52, width - 12), Axis(-0.04 * top, 1.04 * top, height - 46, 12)
    largest = max(counts.values())
    parts = [
        _frame(x, y, x_label, y_label, width, height),
        f'<path class="front" d="M{x.at(0):.1f} {y.at(0):.1f}L{x.at(top):.1f} {y.at(top):.1f}"/>',
        f'<g class="mark query {escape(role, quote=True)}">',
        *(
            f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="{2 + 12 * math.sqrt(count / largest):.1f}"/>'
            for (a, b), count in counts.most_common()
        ),
        "</g>",
    ]
    above = sum(count for (a, b), count in counts.items() if b > a)
    below = sum(count for (a, b), count in counts.items() if b < a)
    told = f"{above} queries above the diagonal, {below} below, {len(points) - above - below} on it."
    return _svg(width, height, f"{y_label} against {x_label}", told, parts)


STYLE = """
svg{--paper:#fff;--ink:#1b2330;--muted:#566173;--line:#dce1e8;--accent:#0b6e63;--teacher:#b1500f;--encoder:#2257b5;
--server:#7a3fa3;--plain:#566173;--c0:#0b6e63;--c1:#2257b5;--c2:#b1500f;--c3:#7a3fa3;--c4:#8a6d00;--c5:#566173;
background:#fff;font:12.5px system-ui,"Segoe UI",Roboto,Arial,"DejaVu Sans",sans-serif}
"""
"""Colours and type of a drawing that stands alone; inside the page they are the page's."""

RULES = """
svg text{fill:var(--ink)} svg .tick,svg .name{fill:var(--muted)} svg .label.mark{fill:var(--colour)}
svg .label{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg path,svg polyline{fill:none} .grid{stroke:var(--line)} .axis{stroke:var(--muted)}
.front{stroke:var(--muted);stroke-dasharray:5 4;stroke-width:1.4}
.mark{--colour:var(--plain)} .mark.bi-encoder{--colour:var(--encoder)} .mark.reranker{--colour:var(--teacher)}
.mark.student{--colour:var(--accent)} .mark.server{--colour:var(--server)}
.mark circle{fill:var(--colour);stroke:var(--paper);stroke-width:1.5} .mark.query circle{fill-opacity:.65}
.mark path{stroke:var(--colour);stroke-width:2;stroke-opacity:.55;stroke-linecap:round}
.curve{stroke:var(--series);stroke-width:2;stroke-linejoin:round} .dot{fill:var(--series)}
.s0{--series:var(--c0)} .s1{--series:var(--c1)} .s2{--series:var(--c2)}
.s3{--series:var(--c3)} .s4{--series:var(--c4)} .s5{--series:var(--c5)}
"""
"""How the parts of a drawing look, in terms of the colours above: the page includes the same rules."""


def standalone(drawing: str, width: int, height: int) -> str:
    """Return a drawing as an SVG file of its own."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return drawing.replace("<svg ", opening, 1).replace(">", f"><style>{STYLE}{RULES}</style>", 1) + "\n"


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, width: int, height: int
) -> str:
    """Draw one line for each series of ``(x, y)`` points; a legend when there are several."""
    points = [point for values in series.values() for point in values]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    room = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 0.05
    legend = 18 * len(series) if len(series) > 1 else 0
    x = Axis(min(0.0, *xs), max(xs) or 1.0, 56, width - 16)
    y = Axis(min(ys) - room, max(ys) + room, height - 46, 12 + legend)
    parts = [_frame(x, y, x_label, y_label, width, height)]
    for number, (name, values) in enumerate(series.items()):
        colour = f"s{number % _SERIES_COLOURS}"
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in values)
        parts.append(f'<polyline class="curve {colour}" points="{path}"/>')
        if len(values) <= 30:
            parts += [f'<circle class="dot {colour}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3"/>' for a, b in values]
        if legend:
            parts.append(
                f'<path class="curve {colour}" d="M58 {14 + 18 * number}h18"/>'
                f'<text class="label" x="82" y="{18 + 18 * number}">{escape(name)}</text>'
            )
    ends = "; ".join(f"{name}: from {values[0][1]:.4g} to {values[-1][1]:.4g}" for name, values in series.items())
    return _svg(width, height, f"{y_label} by {x_label}", ends, parts)


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    label = escape(f"{title}. {description}", quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, width: int, height: int) -> str:
    out = []
    for value, text in y.ticks(5):
        out.append(
            f'<path class="grid" d="M{x.start} {y.at(value):.1f}H{x.end}"/>'
            f'<text class="tick" x="{x.start - 7}" y="{y.at(value) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value, text in x.ticks(max(3, width // 110)):
        out.append(
            f'<path class="grid" d="M{x.at(value):.1f} {y.start}v5"/>'
            f'<text class="tick" x="{x.at(value):.1f}" y="{y.start + 19}" text-anchor="middle">{text}</text>'
        )
    out.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    middle = (x.start + x.end) / 2
    out.append(f'<text class="name" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    across = (y.start + y.end) / 2
    out.append(
        f'<text class="name" transform="translate(11 {across:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(out)


def _drawn(mark: Mark, x: Axis, y: Axis) -> str:
    across, up = x.at(mark.x), y.at(mark.y)
    return (
        f'<g class="mark {escape(mark.role, quote=True)}">'
        f'<path class="whisker" d="M{across:.1f} {y.at(mark.low):.1f}V{y.at(mark.high):.1f}"/>'
        f'<circle cx="{across:.1f}" cy="{up:.1f}" r="6"/></g>'
    )


def _labels(marks: Sequence[Mark], x: Axis, y: Axis, width: int) -> list[str]:
    """Put each label on the side of its mark where it covers least."""
    taken = [_Box(x.at(m.x) - 7, y.at(m.y) - 7, x.at(m.x) + 7, y.at(m.y) + 7) for m in marks]
    out = []
    letters = int(0.6 * width / _CHARACTER)
    for mark in sorted(marks, key=lambda mark: (-mark.y, mark.x)):
        text = mark.name if len(mark.name) <= letters else f"{mark.name[: letters - 1]}…"
        across, up, long = x.at(mark.x), y.at(mark.y), len(text) * _CHARACTER
        places = [
            (across + 11, up + 4),
            (across - 11 - long, up + 4),
            *((across + 9, up + 4 + shift) for shift in (-16, 16)),
            *((across - 9 - long, up + 4 + shift) for shift in (-16, 16)),
            *((across - long / 2, up + 4 + shift) for shift in (-18, 20)),
            *((side, up + 4 + shift) for shift in (-32, 32, -48, 48) for side in (across + 9, across - 9 - long)),
        ]
        boxes = [_Box(left, base - 12, left + long, base + 4) for left, base in places]
        cost = [
            sum(box.overlap(other) for other in taken)
            + 50 * (max(0.0, x.start + 2 - box.left) + max(0.0, box.right - width))
            + 50 * (max(0.0, y.end - box.top) + max(0.0, box.bottom - y.start))
            for box in boxes
        ]
        best = cost.index(min(cost))
        taken.append(boxes[best])
        left = min(max(places[best][0], x.start + 2), max(x.start + 2, width - long - 2))
        out.append(
            f'<text class="label mark {escape(mark.role, quote=True)}" x="{left:.1f}" y="{places[best][1]:.1f}">'
            f"{escape(text)}</text>"
        )
    return out


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _decade_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 2 * count:
            break
    return inside
