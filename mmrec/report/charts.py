"""Charts as SVG, drawn with the page's own colours, so that they follow it into the dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 14, 46
COLOURS = 6
"""Of lines; the page's style names them s0, s1, ..."""
MOST_POINTS = 400
"""Of a line: of more, neighbours are averaged."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve: its name, its points in order, whether each is marked, and whether it stands back."""

    name: str
    points: Points
    marked: bool = False
    faint: bool = False


@dataclass
class _Frame:
    """The axes of a chart: from values to places, and the parts that were drawn."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    height: int = HEIGHT
    parts: list[Markup] = field(default_factory=list)

    def add(self, form: str, *values: object) -> None:
        self.parts.append(Markup(form).format(*values))

    def x_tick(self, value: float, label: str) -> None:
        self.add('<path class="grid" d="M{:.1f} {}V{}"/>', self.x(value), TOP, self.height - BOTTOM)
        place = '<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        self.add(place, self.x(value), self.height - BOTTOM + 17, label)

    def y_tick(self, value: float, label: str) -> None:
        self.add('<path class="grid" d="M{} {:.1f}H{}"/>', LEFT, self.y(value), WIDTH - RIGHT)
        self.add(
            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>', LEFT - 8, self.y(value) + 4, label
        )

    def titles(self, x: str, y: str) -> None:
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.add('<text class="title" x="{}" y="{}" text-anchor="middle">{}</text>', middle, self.height - 8, x)
        height = (TOP + self.height - BOTTOM) / 2
        form = '<text class="title" transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>'
        self.add(form, height, y)

    def svg(self, about: str) -> Markup:
        head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
        return head.format(WIDTH, self.height, about) + Markup("\n").join(self.parts) + Markup("</svg>")


def line_chart(lines: Sequence[Line], x: str, y: str, labels: Sequence[str] | None = None) -> Markup:
    """Return lines over a linear axis, with a legend.

    Args:
        lines: at least one, with at least a point each, all finite. What is faint does not widen the vertical axis.
        x: title of the horizontal axis, which begins at 0.
        y: title of the vertical axis.
        labels: names of the places 0, 1, ... of the horizontal axis, where it is not one of numbers.
    """
    shown = [Line(line.name, _thin(line.points), line.marked, line.faint) for line in lines]
    across = [px for line in shown for px, _ in line.points]
    low, high = _vertical(shown)
    first, last = 0, max(across) or 1
    frame = _Frame(
        x=lambda value: LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT),
        y=lambda value: HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
    )
    for value in ticks(low, high, 5):
        frame.y_tick(value, f"{value:.6g}")
    if labels is None:
        for value in ticks(first, last, 7):
            frame.x_tick(value, f"{value:,.6g}")
    else:
        for place, label in enumerate(labels):
            frame.x_tick(place, label)
    for number, line in enumerate(shown):
        _draw(frame, line, f"s{number % COLOURS}", low, high)
    frame.titles(x, y)
    return legend([line.name for line in shown]) + frame.svg(f"{y} by {x}")


def _draw(frame: _Frame, line: Line, colour: str, low: float, high: float) -> None:
    # An SVG inside the SVG cuts off what lies outside.
    box = LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    frame.add('<svg x="{}" y="{}" width="{}" height="{}" viewBox="{}">', *box, " ".join(map(str, box)))
    path = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in line.points)
    frame.add('<polyline class="line {}{}" points="{}"/></svg>', colour, " faint" if line.faint else "", path)
    if line.marked or len(line.points) == 1:
        for px, py in line.points:
            form = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}: {:.4f}</title></circle>'
            frame.add(form, colour, frame.x(px), frame.y(min(max(py, low), high)), line.name, py)


def spread_chart(rows: Mapping[str, Sequence[tuple[float, float, float]]], x: str) -> Markup:
    """Return a row of histogram for each name, over an axis of powers of 2.

    Args:
        rows: by name, the buckets: lower edge and upper edge as exponents of 2, and the count.
        x: title of the axis.
    """
    step, left = 26, 130
    height = TOP + BOTTOM + step * len(rows)
    edges = [edge for row in rows.values() for lower, upper, _ in row for edge in (lower, upper)]
    first, last = math.floor(min(edges)), math.ceil(max(edges))
    frame = _Frame(
        x=lambda value: left + (value - first) / max(1, last - first) * (WIDTH - left - RIGHT),
        y=lambda value: TOP + step * value,
        height=height,
    )
    every = -(-(last - first) // 12) or 1
    for power in range(first, last + 1, every):
        frame.x_tick(power, f"{2**power:,}" if power >= 0 else f"1/{2**-power}")
    for number, (name, row) in enumerate(rows.items()):
        base, most = frame.y(number + 1), max(count for *_, count in row)
        frame.add('<path class="grid" d="M{} {:.1f}H{}"/>', left, base, WIDTH - RIGHT)
        frame.add('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>', left - 8, base - step / 3, name)
        for lower, upper, count in row:
            tall = (step - 5) * count / most
            form = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            colour = "s1" if "long" in name else "s0"
            frame.add(form, colour, frame.x(lower), base - tall, frame.x(upper) - frame.x(lower) - 0.5, tall)
    middle = (left + WIDTH - RIGHT) / 2
    frame.add('<text class="title" x="{}" y="{}" text-anchor="middle">{}</text>', middle, height - 8, x)
    return frame.svg(x)


def legend(names: Sequence[str]) -> Markup:
    """Return the names of lines with their colours."""
    form = Markup('<span class="key"><i class="s{}"></i>{}</span>')
    keys = Markup(" ").join(form.format(number % COLOURS, escape(name)) for number, name in enumerate(names))
    return Markup('<p class="legend">{}</p>').format(keys)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from ``low`` to ``high``, some ``about`` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(power * factor / rough)))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _vertical(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the range of the vertical axis: of a line that stands back its highest tenth may lie outside."""
    low, high = math.inf, -math.inf
    for line in lines:
        values = sorted(py for _, py in line.points)
        low = min(low, values[0])
        high = max(high, values[-1] if not line.faint else values[int(0.9 * (len(values) - 1))])
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def _thin(points: Points) -> Points:
    size = -(-len(points) // MOST_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(sum(px for px, _ in group) / len(group), sum(py for _, py in group) / len(group)) for group in groups]
