"""What a run found, and how it is read: every point keeps its rounds, and ratios are taken within a round."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.client.phase import Measured

FOLDER = Path("bench/results")


@dataclass
class Point:
    """One server in one situation. `part` says what is varied, and `case` is its value there."""

    part: str
    model: str
    peer: str
    sessions: int
    case: float | str = ""
    rounds: list[Measured] = field(default_factory=list)
    # The raw call's CPU microseconds per chunk in each of these rounds, at its largest batch.
    raw: list[float] = field(default_factory=list)

    def median(self, key: str) -> float:
        return float(statistics.median(getattr(each, key) for each in self.rounds))

    @property
    def over_raw(self) -> float:
        """Server CPU per chunk over that of the raw call."""
        pairs = zip(self.rounds, self.raw, strict=True)
        return statistics.median(each.cpu_us_per_chunk / raw for each, raw in pairs)

    def over(self, other: "Point", key: str = "chunks_per_s") -> float:
        """The median of the rounds' ratios to another point, of the rounds that both have."""
        pairs = zip(self.rounds, other.rounds, strict=False)
        return float(statistics.median(getattr(a, key) / getattr(b, key) for a, b in pairs))


@dataclass
class Results:
    """All of a run."""

    machine: dict[str, Any]
    # What was asked for: rounds, seconds.
    settings: dict[str, Any]
    # Peers by name: how they were configured, or why they are missing.
    notes: dict[str, str]
    # By model: CPU microseconds per chunk by batch size, and "call_ms"; medians.
    raw: dict[str, dict[str, float]]
    # By model, of a session.
    state_bytes: dict[str, int]
    # Seconds until it serves, by peer.
    starts: dict[str, float]
    points: list[Point]
    targets: list[dict[str, Any]] = field(default_factory=list)

    def find(self, part: str, model: str, peer: str, sessions: int, case: float | str = "") -> Point | None:
        """The one point of this description that has a round."""
        return next(
            (
                point
                for point in self.points
                if (point.part, point.model, point.peer, point.sessions, point.case)
                == (part, model, peer, sessions, case)
                and point.rounds
            ),
            None,
        )

    def some(self, wanted: Callable[[Point], bool]) -> list[Point]:
        return [point for point in self.points if point.rounds and wanted(point)]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = [
            Point(**point | {"rounds": [Measured(**each) for each in point["rounds"]]}) for point in found["points"]
        ]
        return cls(**found | {"points": points})


def _rounded(value: Any) -> Any:
    """Five digits say all that was measured."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
