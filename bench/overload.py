"""More than the server can do: what is answered, refused, and how late, from half to twice its capacity.

Poisson arrivals for sessions drawn at random, each sent at once; what the server refuses is not sent again, and latency
counts from the arrival: `python -m bench.overload`.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
import torch
import uvloop
from bench import lineup
from bench.machine import describe
from bench.models import export_all
from bench.servers import running
from bench.sizes import FRAMES, SIZES

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_protos.v1.manifest_pb2 import DATA_TYPE_FLOAT32, POLICY_KIND_CARRY, Policy

LOADS = (0.5, 0.8, 1.0, 1.5, 2.0)
_SESSIONS = 32
# Chunks of a session that may wait: what bounds how late an accepted one is.
_PENDING = 8


@dataclass
class Session:
    """One stream with one session. `sent` has the moments of arrival of what has no answer yet."""

    call: grpc.aio.StreamStreamCall  # type: ignore[type-arg]
    name: str
    tensor: pb.Tensor
    index: int = 0
    sent: deque[tuple[int, float]] = field(default_factory=deque)
    latencies: list[float] = field(default_factory=list)
    refused: int = 0

    async def send(self, moment: float) -> None:
        chunk = pb.Chunk(session_id=self.name, index=self.index, tensors=[self.tensor])
        self.sent.append((self.index, moment))
        self.index += 1
        await self.call.write(pb.StreamRequest(items=[pb.RequestItem(chunk=chunk)]))

    async def read(self) -> None:
        async for response in self.call:
            for item in response.items:
                if item.HasField("opened"):
                    continue
                if item.HasField("result"):
                    self.latencies.append(time.perf_counter() - self._sent(item.result.index))
                else:
                    # A gap too, behind one that found the queue full.
                    self._sent(item.failed.index)
                    self.refused += 1
                    self.index = min(self.index, item.failed.index)

    def _sent(self, index: int) -> float:
        """When the oldest of this index arrived: one that was refused leaves its index to the next."""
        found = next(each for each in self.sent if each[0] == index)
        self.sent.remove(found)
        return found[1]


@dataclass(frozen=True)
class Point:
    """`load` is of the capacity; the rates are in chunks a second."""

    load: float
    offered: float
    answered: float
    refused: float
    p50_ms: float
    p99_ms: float


async def offer(target: str, model: str, load: float, rate: float, seconds: float) -> Point:
    """One open loop."""
    frames = np.random.default_rng(0).standard_normal((FRAMES, SIZES[model][0])).astype(np.float32)
    tensor = pb.Tensor(dtype=DATA_TYPE_FLOAT32, shape=frames.shape, data=frames.tobytes())
    async with grpc.aio.insecure_channel(target) as channel:
        sessions = [Session(CarouselStub(channel).Stream(), f"{load}-{n}", tensor) for n in range(_SESSIONS)]
        reading = [asyncio.create_task(session.read()) for session in sessions]
        for session in sessions:
            opening = pb.Open(session_id=session.name, model=model, policy=Policy(kind=POLICY_KIND_CARRY))
            await session.call.write(pb.StreamRequest(items=[pb.RequestItem(open=opening)]))
        draw = random.Random(0)
        moment = started = time.perf_counter()
        offered = 0
        while moment < started + seconds:
            moment += draw.expovariate(rate)
            if (wait := moment - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            await draw.choice(sessions).send(moment)
            offered += 1
        took = time.perf_counter() - started
        answered = sum(len(session.latencies) for session in sessions)
        for session in sessions:
            await session.call.done_writing()
        await asyncio.gather(*reading)
        latencies = [each for session in sessions for each in session.latencies]
        p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
        refused = sum(session.refused for session in sessions)
        return Point(load, offered / took, answered / took, refused / took, float(p50), float(p99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["A", "B"], default="B")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--models", type=Path, default=Path("models/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/overload.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    peer = lineup.carousel(export_all(given.models)[given.model])
    peer = replace(peer, command=(*peer.command, "--max-pending-chunks", str(_PENDING)))
    with running(peer) as server:
        # What is answered where far more is asked than can be.
        uvloop.run(offer(server.target, given.model, 0.1, 100.0, 1.0))
        capacity = uvloop.run(offer(server.target, given.model, 3.0, 4000.0, given.seconds)).answered
        points = [uvloop.run(offer(server.target, given.model, load, load * capacity, given.seconds)) for load in LOADS]
    for point in points:
        print(
            f"{point.load:4.1f} × capacity: offered {point.offered:5.0f}/s, answered {point.answered:5.0f}/s, "
            f"refused {point.refused:5.0f}/s, p50 {point.p50_ms:6.1f} ms, p99 {point.p99_ms:6.1f} ms"
        )
    found = {
        "machine": describe() | {"load_average": os.getloadavg()[0]},
        "model": given.model,
        "sessions": _SESSIONS,
        "pending": _PENDING,
        "capacity": capacity,
        "points": [asdict(point) for point in points],
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
