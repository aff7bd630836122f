"""What is measured: the points of each part, as trials. A part varies one thing; README's words for it are here."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from bench import lineup, machine, names, references
from bench.client.phase import Phase
from bench.findings import Point, Results
from bench.models import Exported
from bench.servers import Peer
from bench.sizes import COMPARED, FRAMES
from bench.trials import Bench, Trial

# Of capacity.
LOADS = (0.3, 0.6, 0.8, 0.95)
_OPENED = (1_000, 10_000)
_RING = 16


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    sessions: Sequence[int] = (1, 32, 128, 512)
    rounds: int = 3
    seconds: float = 0.8
    arrival_seconds: float = 2.5
    warmup: float = 0.25
    loads: Sequence[float] = LOADS
    # For the raw calls of a round, of each model.
    raw_seconds: float = 1.0
    opened: Sequence[int] = _OPENED


QUICK = Options(
    sessions=(1, 32, 128),
    rounds=1,
    seconds=0.4,
    arrival_seconds=1.2,
    loads=(0.8,),
    raw_seconds=0.4,
    opened=_OPENED[-1:],
)


class Plan:
    """Makes trials, of who is compared on each model. `points` has all that were planned so far, in order."""

    def __init__(self, options: Options, exported: dict[str, Exported], lineups: dict[str, list[Peer]]) -> None:
        self.points: list[Point] = []
        self._options = options
        self._exported = exported
        self._lineups = lineups

    def closed(self) -> list[Trial]:
        """Every peer, model and number of sessions; chunks of 10 frames, carry."""
        return [
            self._trial(names.CLOSED, peer, self._phase(model, peer, sessions))
            for model in COMPARED
            for peer in self._lineups[model]
            for sessions in self._options.sessions
        ]

    def variants(self) -> list[Trial]:
        """B in int8 and float32, in one process."""
        carousels = (lineup.carousel(self._exported["B"], wire) for wire in ("own", "shared"))
        workload = self._workload("B", tolerance=self._exported["B"].int8_tolerance)
        return [
            self._trial(
                names.VARIANTS, peer, replace(self._phase("B", peer), workload=workload, variant=variant), variant
            )
            for peer in carousels
            for variant in ("float32", "int8")
        ]

    def lengths(self) -> list[Trial]:
        """A, with chunks of mixed length and of one frame, where the queue can, too."""
        mixed = tuple(int(length) for length in np.random.default_rng(1).integers(1, 51, 4 * _RING))
        peers = [peer for peer in self._lineups["A"] if peer.name in (names.OWN, names.SHARED, names.QUEUE)]
        return [
            self._trial(names.LENGTHS, peer, replace(self._phase("A", peer), workload=workload), case)
            for peer in peers
            for case, workload in (
                (names.MIXED, self._workload("A", mixed)),
                (names.TOKENS, self._workload("A", (1,) * _RING)),
            )
        ]

    def lookahead(self) -> list[Trial]:
        """Chunks of 8 frames: causal without a backward direction, carry and lookahead(8, 8) with one."""
        trials = []
        for model, policy, case in (
            ("U", "causal", names.CAUSAL_8),
            ("A", "carry", names.CARRY_8),
            ("A", "lookahead", names.LOOKAHEAD_8),
        ):
            answers = references.lookahead if policy == "lookahead" else references.carry
            path = references.write(self._folder, model, [8] * _RING, answers)
            for wire in ("own", "shared"):
                peer = lineup.carousel(self._exported[model], wire)
                phase = replace(self._phase(model, peer), workload=str(path), policy=policy)
                trials.append(self._trial(names.LOOKAHEAD, peer, phase, case))
        return trials

    def arrivals(self) -> list[Trial]:
        """Poisson arrivals at shares of what each peer did in closed loop with as many sessions."""
        trials = []
        for capacity in [each for each in self.points if each.part == names.CLOSED and each.sessions == names.SESSIONS]:
            if capacity.peer not in (names.OWN, names.QUEUE) or not capacity.rounds:
                continue
            peer = next(peer for peer in self._lineups[capacity.model] if peer.name == capacity.peer)
            for load in self._options.loads:
                rate = load * capacity.median("chunks_per_s")
                phase = replace(
                    self._phase(capacity.model, peer), seconds=self._options.arrival_seconds, warmup=1.0, rate=rate
                )
                trials.append(self._trial(names.ARRIVALS, peer, phase, load))
        return trials

    def opened(self) -> list[Trial]:
        """At most 128 active, beside ever more that are open; then again with none beside. Then memory."""
        peer = lineup.carousel(self._exported["A"])
        phase = self._phase("A", peer)
        base = self._point(names.OPENED, peer, phase, float(names.SESSIONS))
        one = replace(phase, sessions=1)
        more = [(replace(phase, idle=opened - names.SESSIONS), float(opened)) for opened in self._options.opened]
        return [
            self._trial(names.OPENED, peer, one, 1.0),
            Trial(peer, phase, base),
            self._trial(names.IDLE, peer, phase, 0.0),
            self._trial(names.IDLE, peer, replace(phase, idle=names.IDLE_SESSIONS), float(names.IDLE_SESSIONS)),
            *(self._trial(names.OPENED, peer, phase, case) for phase, case in more),
            Trial(peer, phase, base),
        ]

    def results(self, bench: Bench, notes: dict[str, str]) -> Results:
        """All that the trials found."""
        return Results(
            machine=machine.describe(),
            settings=asdict(self._options) | {"took_s": bench.elapsed_s()},
            notes=notes | bench.notes,
            raw=bench.raw(),
            state_bytes={name: each.state_bytes for name, each in self._exported.items()},
            starts={name: statistics.median(values) for name, values in bench.starts.items()},
            points=self.points,
        )

    @property
    def _folder(self) -> Path:
        return self._exported["A"].folder.parent

    @cache  # noqa: B019 -- a plan lives as long as its run
    def _workload(self, model: str, lengths: Sequence[int] = (FRAMES,) * _RING, tolerance: float = 1e-5) -> str:
        return str(references.write(self._folder, model, lengths, tolerance=tolerance))

    def _phase(self, model: str, peer: Peer, sessions: int = names.SESSIONS) -> Phase:
        return Phase(
            model=model,
            workload=self._workload(model),
            sessions=sessions,
            seconds=self._options.seconds,
            warmup=self._options.warmup,
            wire=peer.wire,
        )

    def _trial(self, part: str, peer: Peer, phase: Phase, case: float | str = "") -> Trial:
        return Trial(peer, phase, self._point(part, peer, phase, case))

    def _point(self, part: str, peer: Peer, phase: Phase, case: float | str) -> Point:
        point = Point(part, phase.model, peer.name, phase.sessions, case)
        self.points.append(point)
        return point
