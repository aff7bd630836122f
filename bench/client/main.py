"""The client process: runs phases against one server in turn, and prints a line of JSON for each."""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np
import uvloop
from bench.client.loops import closed_loop, open_loop
from bench.client.native import Chunks, SharedStream
from bench.client.phase import Measured, Phase
from bench.client.record import Record
from bench.client.wires import sessions
from bench.processes import Tree
from bench.workload import Workload

from carousel_protos.v1.carousel_pb2 import GetModelRequest, Statistics
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

_NATIVE = ("own", "shared")
# For the first answers of all sessions, and then for the least that is measured, of a server that is slow.
_PATIENCE_S = 60.0
_LEAST = 10


@dataclass(frozen=True)
class Reading:
    """All counters at one moment of `time.perf_counter`."""

    at: float
    cpu_s: float
    client_s: float
    statistics: Statistics


class Client:
    """One server, talked to over one channel."""

    def __init__(self, channel: grpc.aio.Channel, target: str, tree: Tree) -> None:
        self._channel, self._target, self._tree = channel, target, tree
        self._stub = CarouselStub(channel)

    async def run(self, phase: Phase) -> Measured:
        workload = Workload.load(Path(phase.workload))
        record = Record(workload, phase.sessions)
        idle = SharedStream(self._channel, phase, Chunks(workload), phase.idle)
        if phase.idle:
            await idle.open()
            await idle.used_once()
        async with asyncio.TaskGroup() as tasks:
            metering = tasks.create_task(self._meter(phase, record))
            await self._load(phase, workload, record)
        if phase.idle:
            await idle.close()
        return metering.result()

    async def _load(self, phase: Phase, workload: Workload, record: Record) -> None:
        if phase.wire == "shared":
            stream = SharedStream(self._channel, phase, Chunks(workload), phase.sessions)
            await stream.open()
            await stream.closed_loop(record)
            await stream.close()
            return
        everyone = sessions(phase, workload, self._channel, self._target)
        await asyncio.gather(*(session.open() for session in everyone))
        if phase.rate:
            await open_loop(everyone, phase.rate, record)
        else:
            async with asyncio.TaskGroup() as tasks:
                for number, session in enumerate(everyone):
                    tasks.create_task(closed_loop(session, number, record))
        await asyncio.gather(*(session.close() for session in everyone))

    async def _meter(self, phase: Phase, record: Record) -> Measured:
        """Wait until all is warm, read the counters, wait, read them again, and end the load."""
        if not phase.rate:
            await asyncio.wait_for(record.warm.wait(), _PATIENCE_S)
        await asyncio.sleep(phase.warmup)
        began = await self._read(phase)
        await asyncio.sleep(phase.seconds)
        deadline = began.at + _PATIENCE_S
        # Polled: a server this slow has time to spare.
        while record.since(began.at) < _LEAST and time.perf_counter() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        ended = await self._read(phase)
        memory = self._tree.memory_mb()
        record.over = True
        return _summarise(phase, record, began, ended, memory)

    async def _read(self, phase: Phase) -> Reading:
        statistics = Statistics()
        if phase.wire in _NATIVE:
            statistics = (await self._stub.GetModel(GetModelRequest(model=phase.model))).statistics
        return Reading(time.perf_counter(), self._tree.cpu_seconds(), time.process_time(), statistics)


def _summarise(phase: Phase, record: Record, began: Reading, ended: Reading, memory_mb: float) -> Measured:
    latencies = record.latencies(began.at, ended.at)
    if not latencies.size:
        raise RuntimeError(f"no answer came within {_PATIENCE_S:g} s")
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    a, b = began.statistics, ended.statistics
    steps, frames, padded = b.steps - a.steps, b.frames - a.frames, b.padded_frames - a.padded_frames
    run_s = b.run_seconds - a.run_seconds
    return Measured(
        chunks_per_s=latencies.size / (ended.at - began.at),
        p50_ms=float(p50),
        p99_ms=float(p99),
        cpu_us_per_chunk=(ended.cpu_s - began.cpu_s) / latencies.size * 1e6,
        memory_mb=memory_mb,
        max_abs_error=record.worst,
        client_us_per_chunk=(ended.client_s - began.client_s) / latencies.size * 1e6,
        arrivals_per_s=phase.rate,
        rows_per_step=(b.rows - a.rows) / steps if steps else None,
        padding_waste=padded / (frames + padded) if steps else None,
        step_ms=run_s / steps * 1e3 if steps else None,
        run_us_per_chunk=run_s / latencies.size * 1e6 if steps else None,
    )


async def run(target: str, pid: int, phases: list[Phase]) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        client = Client(channel, target, Tree(pid))
        for phase in phases:
            print(json.dumps(asdict(await client.run(phase))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's, whose CPU seconds are counted")
    given = parser.parse_args()
    uvloop.run(run(given.target, given.pid, [Phase(**phase) for phase in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
