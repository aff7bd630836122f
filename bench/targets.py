"""What a session of Carousel must reach, each as a ratio within one run: reached or not, and by how much."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import names
from bench.findings import Point, Results
from bench.names import OWN, SHARED

_AHEAD = 1.15 * (8 + 8) / 8


@dataclass(frozen=True)
class Target:
    """`got` is None where the run did not measure it."""

    what: str
    peer: str
    at_most: bool
    limit: float
    unit: str
    got: float | None

    @property
    def reached(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.limit if self.at_most else self.got >= self.limit


def targets(results: Results) -> list[Target]:
    """All of them, in order."""
    return [
        *_cpu(results),
        *_throughput(results),
        *_variants(results),
        *_latency(results),
        *_rows(results),
        *_open_sessions(results),
        *_lookahead(results),
    ]


def _closed(results: Results, model: str, peer: str, sessions: int) -> Point | None:
    return results.find(names.CLOSED, model, peer, sessions)


def _ratio(a: Point | None, b: Point | None, key: str = "chunks_per_s") -> float | None:
    return a.over(b, key) if a and b else None


def _cpu(results: Results) -> Iterator[Target]:
    for model, own, shared in (("A", 1.8, 1.3), ("B", 1.2, 1.1)):
        for peer, limit in ((OWN, own), (SHARED, shared)):
            point = _closed(results, model, peer, names.SESSIONS)
            what = f"server CPU per chunk, {model}, {names.SESSIONS} sessions"
            yield Target(what, peer, True, limit, "× raw", point.over_raw if point else None)


# Model, peer, sessions: at least so many times the throughput.
_AGAINST_TRITON = {
    ("A", OWN): {32: 1.3, 128: 1.3},
    ("B", OWN): {32: 1.3, 128: 1.0},
    ("A", SHARED): {32: 2.2, 128: 2.2},
    ("B", SHARED): {32: 1.4, 128: 1.4},
}
_AGAINST_QUEUE = {
    ("A", OWN): {1: 1.0, 32: 1.0, 128: 1.0, 512: 1.0},
    ("B", OWN): {1: 1.0, 32: 1.2, 128: 1.0, 512: 1.0},
    ("A", SHARED): {32: 1.8, 128: 1.8},
    ("B", SHARED): {32: 1.3, 128: 1.3},
}


def _throughput(results: Results) -> Iterator[Target]:
    for other, limits in ((names.TRITON, _AGAINST_TRITON), (names.QUEUE, _AGAINST_QUEUE)):
        for (model, peer), by_sessions in limits.items():
            for sessions, limit in by_sessions.items():
                got = _ratio(_closed(results, model, peer, sessions), _closed(results, model, other, sessions))
                yield Target(f"throughput, {model}, {sessions} sessions", peer, False, limit, f"× {other}", got)


def _variants(results: Results) -> Iterator[Target]:
    for peer, limit in ((OWN, 1.5), (SHARED, 2.0)):
        int8, float32 = (results.find(names.VARIANTS, "B", peer, names.SESSIONS, case) for case in ("int8", "float32"))
        what = f"throughput of int8, B, {names.SESSIONS} sessions"
        yield Target(what, peer, False, limit, "× float32", _ratio(int8, float32))


def _latency(results: Results) -> Iterator[Target]:
    for model, raw in ((name, results.raw[name]) for name in results.raw if name != "U"):
        single = _closed(results, model, OWN, 1)
        got = single.median("p50_ms") - raw["call_ms"] if single else None
        yield Target(f"p50 of a single session over the raw call, {model}", OWN, True, 0.5, "ms", got)
    for model in ("A", "B"):
        point = results.find(names.ARRIVALS, model, OWN, names.SESSIONS, 0.8)
        got = point.median("p99_ms") / point.median("step_ms") if point else None
        yield Target(f"p99 at 80 % of capacity, open loop, {model}", OWN, True, 4.0, "× mean step", got)


def _rows(results: Results) -> Iterator[Target]:
    for model in ("A", "B"):
        point = _closed(results, model, OWN, names.SESSIONS)
        got = point.median("rows_per_step") if point else None
        yield Target(f"rows per step at saturation, {model}, {names.SESSIONS} sessions", OWN, False, 24, "rows", got)


def idle_bytes(results: Results) -> float | None:
    """Resident bytes per idle session over its state, of model A."""
    empty, full = (results.find(names.IDLE, "A", OWN, names.SESSIONS, float(idle)) for idle in (0, names.IDLE_SESSIONS))
    if not (empty and full):
        return None
    grown = full.median("memory_mb") - empty.median("memory_mb")
    return grown * 1024**2 / names.IDLE_SESSIONS - results.state_bytes["A"]


def _open_sessions(results: Results) -> Iterator[Target]:
    yield Target("memory per idle session over its state, A", OWN, True, 3000, "bytes", idle_bytes(results))
    few, many = (results.find(names.OPENED, "A", OWN, names.SESSIONS, float(opened)) for opened in (128, 10_000))
    got = many.median("cpu_us_per_chunk") / few.median("cpu_us_per_chunk") if few and many else None
    what = f"cost per chunk with 10,000 open sessions, {names.SESSIONS} active, A"
    yield Target(what, OWN, True, 1.1, f"× with {names.SESSIONS} open", got)


def _lookahead(results: Results) -> Iterator[Target]:
    for peer in (OWN, SHARED):
        ahead, carry = (
            results.find(names.LOOKAHEAD, "A", peer, names.SESSIONS, case)
            for case in (names.LOOKAHEAD_8, names.CARRY_8)
        )
        got = _ratio(ahead, carry, "run_us_per_chunk")
        yield Target("time in the graph, lookahead(8, 8), A", peer, True, _AHEAD, "× carry of 8 frames", got)
