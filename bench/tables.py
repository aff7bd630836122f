"""The results as tables of text; the terminal and the documents show the same ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import names
from bench.findings import Point, Results
from bench.names import OWN
from bench.sizes import COMPARED
from bench.targets import idle_bytes, targets


@dataclass(frozen=True)
class Table:
    """`words` of the columns, from the left, are text; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        rules = ["---"] * self.words + ["---:"] * (len(self.columns) - self.words)
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rules, *self.rows))


# A column: its head, and a point's text in it.
_Column = tuple[str, Callable[[Point], str]]


def _optional(key: str, form: Callable[[float], str]) -> Callable[[Point], str]:
    """Carousel's own statistics, which peers have none of."""
    return lambda point: "" if getattr(point.rounds[0], key) is None else form(point.median(key))


_SPEED: list[_Column] = [
    ("chunks/s", lambda point: f"{point.median('chunks_per_s'):,.0f}"),
    ("p50 ms", lambda point: f"{point.median('p50_ms'):,.2f}"),
    ("p99 ms", lambda point: f"{point.median('p99_ms'):,.2f}"),
]
_CPU: list[_Column] = [
    ("server CPU µs/chunk", lambda point: f"{point.median('cpu_us_per_chunk'):,.0f}"),
    ("× raw", lambda point: f"{point.over_raw:.2f}"),
]
_MEMORY: _Column = ("MB", lambda point: f"{point.median('memory_mb'):,.0f}")
_ROWS: _Column = ("rows/step", _optional("rows_per_step", lambda value: f"{value:.1f}"))
_WASTE: _Column = ("padding", _optional("padding_waste", lambda value: f"{value:.1%}"))


def _points(title: str, heads: list[_Column], columns: list[_Column], points: Sequence[Point]) -> Table:
    every = [*heads, *columns]
    rows = [[text(point) for _, text in every] for point in points]
    return Table(title, [head for head, _ in every], rows, words=len(heads))


def closed(results: Results, model: str, sessions: Sequence[int] = ()) -> Table:
    """Every peer of a model in closed loop."""
    points = results.some(lambda point: point.part == names.CLOSED and point.model == model)
    points = [point for point in points if not sessions or point.sessions in sessions]
    return _points(
        f"model {model}, closed loop",
        [("sessions", lambda point: str(point.sessions)), ("server", lambda point: point.peer)],
        [*_SPEED, *_CPU, _MEMORY, _ROWS, _WASTE],
        sorted(points, key=lambda point: point.sessions),
    )


def part(results: Results, name: str) -> Table:
    """All points of a part that is told apart by its cases in words."""
    return _points(
        f"{name}, {names.SESSIONS} sessions",
        [
            ("case", lambda point: str(point.case)),
            ("model", lambda point: point.model),
            ("server", lambda point: point.peer),
        ],
        [*_SPEED, _CPU[0], _ROWS, _WASTE],
        sorted(results.some(lambda point: point.part == name), key=lambda point: str(point.case)),
    )


def arrivals(results: Results) -> Table:
    """Latency against load."""
    return _points(
        f"Poisson arrivals, open loop, {names.SESSIONS} sessions",
        [("model", lambda point: point.model), ("server", lambda point: point.peer)],
        [
            ("load", lambda point: f"{point.case:.0%}"),
            ("arrive/s", lambda point: f"{point.median('arrivals_per_s'):,.0f}"),
            *_SPEED,
            _CPU[0],
            _ROWS,
        ],
        results.some(lambda point: point.part == names.ARRIVALS),
    )


def opened(results: Results) -> Table:
    """Cost against open sessions."""
    return _points(
        "open sessions, model A",
        [("open", lambda point: f"{point.case:,.0f}"), ("active", lambda point: str(point.sessions))],
        [*_SPEED, _CPU[0], _MEMORY, _ROWS],
        results.some(lambda point: point.part == names.OPENED),
    )


def raw(results: Results) -> Table:
    """The limit."""
    batches = [batch for batch in next(iter(results.raw.values())) if batch.isdecimal()]
    rows = [
        [model, *(f"{found[batch]:.0f}" for batch in batches), f"{found['call_ms']:.2f}"]
        for model, found in results.raw.items()
    ]
    columns = ["model", *(f"batch {batch}, µs/chunk" for batch in batches), "a call at batch 1, ms"]
    return Table("raw onnxruntime: CPU per chunk", columns, rows)


def starts(results: Results) -> Table:
    """Seconds until a server serves, and what an idle session holds."""
    rows = [[name, f"{seconds:.2f}"] for name, seconds in results.starts.items()]
    return Table("start-up: seconds from the process's start until it serves", ["server", "s"], rows)


def idle(results: Results) -> Table:
    """Memory of sessions that were used once and wait."""
    found = idle_bytes(results)
    state = results.state_bytes["A"]
    rows = [[f"{names.IDLE_SESSIONS:,}", f"{state:,}", "" if found is None else f"{found:,.0f}"]]
    return Table("an idle session of model A", ["sessions", "state bytes", "bytes over its state"], rows, words=0)


def goals(results: Results) -> Table:
    """Each target, reached or not."""
    said = {True: "reached", False: "not reached", None: "not measured"}
    rows = [
        [
            target.what,
            "one stream each" if target.peer == OWN else "one stream for all",
            f"{'≤' if target.at_most else '≥'} {target.limit:g} {target.unit}",
            "" if target.got is None else f"{target.got:,.2f}" if target.got < 100 else f"{target.got:,.0f}",
            said[target.reached],
        ]
        for target in targets(results)
    ]
    return Table("targets", ["what", "streams", "wanted", "measured", ""], rows, words=3)


def everything(results: Results) -> list[Table]:
    """All tables that have rows."""
    tables = [raw(results), *(closed(results, model) for model in COMPARED), arrivals(results)]
    tables += [part(results, name) for name in (names.VARIANTS, names.LENGTHS, names.LOOKAHEAD)]
    tables += [opened(results), starts(results), idle(results), goals(results)]
    return [table for table in tables if table.rows]
