"""Where each microsecond of a chunk goes inside the server, gRPC's own left out: `python -m bench.budget`.

One process, one thread, no network: messages as a client writes them pass the front door's reader, the engine and the
front door's writer, as in a server with one stream. The stages' functions are timed one by one, each without what other
stages do inside it; the same is run without the clocks beside it, so that what these cost is seen. CPU microseconds per
chunk, medians over rounds.
"""
# ruff: noqa: SLF001 -- what it times are the front door's own parts

import argparse
import asyncio
import functools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from bench.machine import describe
from bench.models import Exported, export_all
from bench.sizes import COMPARED, FRAMES, SIZES
from rich.console import Console
from rich.table import Table

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.manifest_pb2 import DATA_TYPE_FLOAT32, POLICY_KIND_CARRY, Policy
from carousel_server.config import ServerConfig
from carousel_server.engine import arena, onnx_runtime, runner, scheduler, steps
from carousel_server.engine.engine import Engine
from carousel_server.front import stream

# A stage is its functions' own time.
STAGES: dict[str, list[tuple[Any, str]]] = {
    "decode": [(stream.StreamCall, "_chunk"), (stream, "decode")],
    "session": [(Engine, "submit")],
    "schedule": [(steps.Steps, "add"), (scheduler.Scheduler, "schedule"), (scheduler.Scheduler, "finish")],
    "gather": [(runner.Runner, "gather"), (arena.Arena, "gather")],
    "run": [(onnx_runtime.OnnxRuntime, "run")],
    "scatter": [(arena.Arena, "scatter"), (runner.Outcome, "rows")],
    "commit": [(steps.Steps, "_commit")],
    "encode": [(stream.StreamCall, "_response")],
}
SESSIONS, ITEMS = 128, 64


class Clocks:
    """Exclusive seconds by stage."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack: list[tuple[str, float]] = []

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            now = time.perf_counter()
            if self._stack:
                outer, since = self._stack[-1]
                self.seconds[outer] += now - since
            self._stack.append((stage, time.perf_counter()))
            try:
                return function(*arguments, **named)
            finally:
                now = time.perf_counter()
                _, since = self._stack.pop()
                self.seconds[stage] += now - since
                if self._stack:
                    self._stack[-1] = self._stack[-1][0], time.perf_counter()

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """The stages' functions are timed meanwhile."""
        patches = [
            patch.object(owner, name, self.wrap(stage, getattr(owner, name)))
            for stage, functions in STAGES.items()
            for owner, name in functions
        ]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


class Loop:
    """A model served in this process, and 128 sessions of one stream that send and take in turns."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._steps = engine.catalogue.get(model).steps
        self._call = stream.StreamCall(engine, None)  # type: ignore[arg-type] -- nothing is read or written
        self._names = [f"session-{number}" for number in range(SESSIONS)]
        for name in self._names:
            item = pb.RequestItem(open=pb.Open(session_id=name, model=model, policy=Policy(kind=POLICY_KIND_CARRY)))
            self._call._take(item)
        self._answers()
        chunk = np.random.default_rng(0).standard_normal((FRAMES, SIZES[model][0])).astype(np.float32)
        self._tensor = pb.Tensor(dtype=DATA_TYPE_FLOAT32, shape=chunk.shape, data=chunk.tobytes())
        self._index = 0

    def turn(self, clock: Callable[[], float] = time.process_time) -> float:
        """A chunk of each session, from the bytes that come in to the bytes that go out; the seconds that it took."""
        requests = [self._request(first) for first in range(0, SESSIONS, ITEMS)]
        started = clock()
        for request in requests:
            for item in pb.StreamRequest.FromString(request).items:
                self._call._take(item)
        while self._steps.turn():
            pass
        answered = self._answers()
        seconds = clock() - started
        assert answered == SESSIONS
        self._index += 1
        return seconds

    def _request(self, first: int) -> bytes:
        items = [
            pb.RequestItem(chunk=pb.Chunk(session_id=name, index=self._index, tensors=[self._tensor]))
            for name in self._names[first : first + ITEMS]
        ]
        return pb.StreamRequest(items=items).SerializeToString()

    def _answers(self) -> int:
        count = 0
        while self._call._outbox:
            response = self._call._response()
            response.SerializeToString()
            count += len(response.items)
        return count


async def measure(exported: Exported, rounds: int, seconds: float) -> dict[str, float]:
    """CPU microseconds per chunk by stage, "messages" for what is in none of them, and "total" without the clocks."""
    engine = Engine(ServerConfig(models=exported.folder, threads=1))
    await engine.start()
    try:
        found: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "messages", "total")}
        loop = Loop(engine, exported.name)
        turns = max(3, int(seconds / max(loop.turn(time.perf_counter), loop.turn(time.perf_counter))))
        for _ in range(rounds):
            found["total"].append(statistics.median(loop.turn() for _ in range(turns)) / SESSIONS * 1e6)
            clocks, whole = Clocks(), 0.0
            with clocks.running():
                for _ in range(turns):
                    whole += loop.turn(time.perf_counter)
            for stage in STAGES:
                found[stage].append(clocks.seconds[stage] / turns / SESSIONS * 1e6)
            found["messages"].append((whole - sum(clocks.seconds.values())) / turns / SESSIONS * 1e6)
        return {stage: round(statistics.median(values), 2) for stage, values in found.items()}
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round, each way")
    parser.add_argument("--models", type=Path, default=Path("models/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/budget.json"))
    given = parser.parse_args()
    exported = export_all(given.models)
    budget = {model: asyncio.run(measure(exported[model], given.rounds, given.seconds)) for model in COMPARED}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": describe(), "budget": budget}, indent=1) + "\n", encoding="utf-8")
    table = Table(title="CPU µs per chunk inside the server, gRPC's left out", title_justify="left")
    table.add_column("stage")
    for model in budget:
        table.add_column(f"model {model}", justify="right")
    for stage in (*STAGES, "messages", "total"):
        table.add_row(stage, *(f"{budget[model][stage]:.1f}" for model in budget))
    Console().print(table)


if __name__ == "__main__":
    main()
