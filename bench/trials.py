"""Rounds: the raw call, then every server in turn, each with all that is asked of it; and again."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client.phase import Phase
from bench.findings import Point
from bench.models import Exported
from bench.raw import Raw, RawFigures
from bench.servers import Peer, PeerError, running


@dataclass(frozen=True)
class Trial:
    """A phase on a server, and the point that it is a round of. Those of one server share its process."""

    peer: Peer
    phase: Phase
    point: Point


class Bench:
    """Runs trials, and keeps what is known beside them: the raw calls, start-up times, and who failed."""

    def __init__(self, exported: dict[str, Exported], raw_seconds: float) -> None:
        self.starts: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}
        self._raw_seconds = raw_seconds
        self._limits = {name: Raw(each.graph) for name, each in exported.items()}
        self._raw: dict[str, list[RawFigures]] = {name: [] for name in exported}
        self._began = time.perf_counter()

    def run(self, trials: Sequence[Trial], rounds: int) -> None:
        """Every round appends one measurement to each trial's point.

        An optional peer that fails is noted and left out from then on; raises `PeerError` for any other.
        """
        for turn in range(rounds):
            for model in dict.fromkeys(trial.phase.model for trial in trials):
                raw = self._limits[model].measure(self._raw_seconds)
                self._raw[model].append(raw)
                mine = [trial for trial in trials if trial.phase.model == model]
                for peer in {trial.peer.name: trial.peer for trial in mine}.values():
                    self._say(f"round {turn + 1} of {rounds}, model {model}, {peer.name}")
                    self._visit(peer, [trial for trial in mine if trial.peer.name == peer.name], raw)

    def _visit(self, peer: Peer, trials: Sequence[Trial], raw: RawFigures) -> None:
        if peer.name in self.notes:
            return
        try:
            with running(peer) as server:
                found = server.measure([trial.phase for trial in trials])
        except PeerError as error:
            if not peer.optional:
                raise
            said = " ".join(str(error).split())[-300:]
            self.notes[peer.name] = f"left out from model {trials[0].phase.model} on, where it failed: {said}"
            self._say(self.notes[peer.name])
            return
        self.starts.setdefault(peer.name, []).append(server.start_s)
        for trial, measured in zip(trials, found, strict=True):
            trial.point.rounds.append(measured)
            trial.point.raw.append(raw.limit)

    def raw(self) -> dict[str, dict[str, float]]:
        """Medians over the rounds, as `Results.raw` has them."""
        return {
            model: {
                str(batch): statistics.median(each.cpu_us_per_chunk[batch] for each in rounds)
                for batch in rounds[0].cpu_us_per_chunk
            }
            | {"call_ms": statistics.median(each.call_ms for each in rounds)}
            for model, rounds in self._raw.items()
            if rounds
        }

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began

    def _say(self, what: str) -> None:
        print(f"{self.elapsed_s():5.0f} s  {what}", flush=True)
