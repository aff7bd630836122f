"""The results as drawings, in the colours and geometry of the exporter's report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import names
from bench.findings import Point, Results
from bench.sizes import COMPARED

from carousel_export.charts import Axis, Chart, Line
from carousel_export.page import environment

_COLOURS = (names.OWN, names.SHARED, names.TRITON, names.QUEUE, names.BY_HAND, names.EAGER)


@dataclass(frozen=True)
class Key:
    """A line in the legend."""

    name: str
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Drawing:
    """Charts side by side, and what their lines are."""

    title: str
    charts: Sequence[Chart]
    keys: Sequence[Key]


def write(results: Results, folder: Path) -> None:
    """Draw whatever the results have points for."""
    for name, drawing in drawings(results).items():
        if all(chart.lines for chart in drawing.charts):
            (folder / f"{name}.svg").write_text(render(drawing), encoding="utf-8")


def render(drawing: Drawing) -> str:
    """As SVG."""
    template = environment().from_string((Path(__file__).parent / "plot.svg.j2").read_text(encoding="utf-8"))
    return template.render(drawing=drawing)


def drawings(results: Results) -> dict[str, Drawing]:
    """By the name of their file."""
    closed = results.some(lambda point: point.part == names.CLOSED)
    arrived = results.some(lambda point: point.part == names.ARRIVALS)
    return {
        "cpu": _by_sessions(
            closed,
            "server CPU per chunk, µs",
            lambda point: point.median("cpu_us_per_chunk"),
            {model: found["64"] for model, found in results.raw.items()},
        ),
        "throughput": _by_sessions(closed, "chunks/s", lambda point: point.median("chunks_per_s")),
        "latency": _latency(arrived),
    }


def _by_sessions(
    points: list[Point], what: str, value: Callable[[Point], float], raw: Mapping[str, float] | None = None
) -> Drawing:
    charts = []
    for model in COMPARED:
        mine = [point for point in points if point.model == model]
        sessions = [float(point.sessions) for point in mine] or [1.0]
        limit = raw[model] if raw else None
        values = [value(point) for point in mine] + ([limit] if limit else [])
        charts.append(
            Chart(
                f"model {model}",
                Axis.doubling("sessions", sessions, origin=1),
                Axis.decades(what, values, text=lambda decade: f"{10.0**decade:,.0f}"),
                [
                    Line([(point.sessions, value(point)) for point in line], colour, marked=True)
                    for colour, line in _lines(mine)
                ],
                limit=(limit, "raw, batch 64") if limit else None,
            )
        )
    return Drawing(f"{what}, closed loop: model A left, model B right", charts, _keys(points))


def _latency(points: list[Point]) -> Drawing:
    """Latency against the chunks that arrive: full lines the median, dashed ones the 99th percentile."""
    charts = []
    for model in COMPARED:
        mine = [point for point in points if point.model == model]
        fastest = max((point.median("arrivals_per_s") for point in mine), default=1.0)
        latencies = [point.median(key) for point in mine for key in ("p50_ms", "p99_ms")]
        charts.append(
            Chart(
                f"model {model}",
                Axis.linear("chunks/s that arrive", fastest),
                Axis.decades("ms", latencies, text=lambda decade: f"{10.0**decade:g}"),
                [
                    Line(
                        [(point.median("arrivals_per_s"), point.median(key)) for point in line],
                        colour,
                        dashed=key == "p99_ms",
                        marked=True,
                    )
                    for colour, line in _lines(mine)
                    for key in ("p50_ms", "p99_ms")
                ],
            )
        )
    keys = _keys(points)
    both = [
        Key(f"{key.name}: {what}", key.colour, dashed)
        for key in keys
        for what, dashed in (("p50", False), ("p99", True))
    ]
    return Drawing("latency in ms, Poisson arrivals at 128 sessions: model A left, model B right", charts, both)


def _lines(points: list[Point]) -> list[tuple[int, list[Point]]]:
    """Each peer's points under its colour."""
    found = [(colour, [point for point in points if point.peer == peer]) for colour, peer in enumerate(_COLOURS)]
    return [(colour, line) for colour, line in found if line]


def _keys(points: list[Point]) -> list[Key]:
    return [Key(peer, colour) for colour, peer in enumerate(_COLOURS) if any(point.peer == peer for point in points)]
