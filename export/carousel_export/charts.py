"""Geometry of the report's line charts; the template draws them as SVG, so they follow its colours, light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

_MOST_POINTS = 100  # more would be a thicket of spikes
_MOST_DECADES = 6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A label, ticks as (value, text), and a scale from a value to its place, 0 to 1."""

    label: str
    ticks: Sequence[tuple[float, str]]
    scale: Callable[[float], float]

    @classmethod
    def linear(cls, label: str, high: float) -> Self:
        """From 0 to `high`, with a tick at each round number."""
        high = max(high, 1.0)
        step = next(step for e in range(12) for m in (1, 2, 5) if high / (step := m * 10**e) <= 6)
        ticks = [(float(value), f"{value:,}") for value in range(0, int(high) + 1, step)]
        return cls(label, ticks, lambda value: value / high)

    @classmethod
    def doubling(cls, label: str, values: Sequence[float], *, origin: float) -> Self:
        """The values that occur, from `origin`, each doubling as far from the last as the one before."""

        def place(value: float) -> float:
            return math.log2(value - origin + 1)

        last = place(max(values)) or 1.0
        ticks: list[tuple[float, str]] = []
        for value in sorted({origin, *values}):
            if not ticks or place(value) - place(ticks[-1][0]) >= last / 12:
                ticks.append((value, f"{value:.3g}"))
        return cls(label, ticks, lambda value: place(value) / last)

    @classmethod
    def decades(
        cls, label: str, values: Sequence[float], *, text: Callable[[int], str] | None = None, zero: str = "0"
    ) -> Self:
        """Logarithmic over at most six decades, zero below them; what is not finite stands at the top."""
        finite = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
        low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
        low = min(max(low, high - _MOST_DECADES), high - 1)
        text = text or (lambda decade: f"10{str(decade).translate(_SUPERSCRIPTS)}")
        stride = math.ceil((high - low) / 7)
        ticks = [(0.0, zero)] + [(10.0**decade, text(decade)) for decade in range(high, low - 1, -stride)]

        def scale(value: float) -> float:
            if value == 0:
                return 0.0
            return max(0.0, (math.log10(value) - low + 1) / (high - low + 1)) if math.isfinite(value) else 1.0

        return cls(label, ticks, scale)


@dataclass(frozen=True)
class Line:
    """One line: its points, a colour by number, and whether it is dashed or has a mark at each point."""

    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over two axes, with its place on the page in pixels.

    `upside_down` puts small values on top; `limit` is a value of y, and what it is called, drawn as a line across.
    """

    # small enough that the text stays legible on a phone
    width: ClassVar[int] = 440
    height: ClassVar[int] = 270
    left: ClassVar[int] = 58
    right: ClassVar[int] = 428
    top: ClassVar[int] = 10
    bottom: ClassVar[int] = 226

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    upside_down: bool = False
    limit: tuple[float, str] | None = None

    def across(self, value: float) -> float:
        """The x coordinate of a value, in pixels."""
        return round(self.left + self.x.scale(value) * (self.right - self.left), 1)

    def down(self, value: float) -> float:
        """The y coordinate of a value, in pixels."""
        place = self.y.scale(value)
        return round(self.top + (place if self.upside_down else 1 - place) * (self.bottom - self.top), 1)

    def pixels(self, line: Line) -> list[tuple[float, float]]:
        """The points of a line in pixels."""
        return [(self.across(x), self.down(y)) for x, y in thin(line.points)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 100 points: of each run of neighbours the highest stays, so that no peak is lost."""
    run = math.ceil(len(points) / _MOST_POINTS) or 1
    return [
        max(points[i : i + run], key=lambda point: math.inf if math.isnan(point[1]) else point[1])
        for i in range(0, len(points), run)
    ]
