"""A client process: N sessions in closed loop against one server, for a number of seconds; prints one line of JSON.

Each session sends a chunk of 10 frames and waits for its answer. The frames repeat with a period, so the answers of the
first chunks are checked against eager PyTorch, which the parent gives as a file.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import uvloop

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_protos.v1.manifest_pb2 import DATA_TYPE_FLOAT32, POLICY_KIND_CARRY, Policy

_CHECKED = 4


class Load:
    """What is sent, what has to come back, and what was measured."""

    def __init__(self, chunks: np.ndarray, wanted: np.ndarray, seconds: float, warmup: float) -> None:
        self.chunks = [np.ascontiguousarray(chunk).tobytes() for chunk in chunks]
        self.shape = chunks.shape[1:]
        self.wanted = wanted
        self.latencies: list[float] = []
        self.worst = 0.0
        self.begin = time.perf_counter() + warmup
        self.end = self.begin + seconds

    def done(self, index: int, sent: float, answer: bytes) -> None:
        now = time.perf_counter()
        if index < _CHECKED:
            got = np.frombuffer(answer, np.float32).reshape(self.wanted[index].shape)
            self.worst = max(self.worst, float(np.abs(got - self.wanted[index]).max()))
        if self.begin <= now < self.end:
            self.latencies.append(now - sent)

    def report(self) -> dict[str, float]:
        ordered = np.array(self.latencies or [float("nan")])
        return {
            "chunks": len(self.latencies),
            "chunks_per_s": len(self.latencies) / (self.end - self.begin),
            "p50_ms": float(np.percentile(ordered, 50)) * 1e3,
            "p99_ms": float(np.percentile(ordered, 99)) * 1e3,
            "max_abs_error": self.worst,
        }


async def own_stream(channel: grpc.aio.Channel, model: str, number: int, load: Load) -> None:
    """A session on a stream of its own."""
    stream = CarouselStub(channel).Stream()
    name = f"{os.getpid()}-{number}"
    opening = pb.Open(session_id=name, model=model, policy=Policy(kind=POLICY_KIND_CARRY))
    await stream.write(pb.StreamRequest(items=[pb.RequestItem(open=opening)]))
    await stream.read()
    index = 0
    while time.perf_counter() < load.end:
        sent = time.perf_counter()
        await stream.write(pb.StreamRequest(items=[_chunk(name, index, load)]))
        response = await stream.read()
        load.done(index, sent, response.items[0].result.tensors[0].data)
        index += 1
    stream.cancel()


async def shared_stream(channel: grpc.aio.Channel, model: str, sessions: int, load: Load) -> None:
    """All sessions on one stream: what was answered together is sent on together."""
    stream = CarouselStub(channel).Stream()
    policy = Policy(kind=POLICY_KIND_CARRY)
    names = [f"{os.getpid()}-{number}" for number in range(sessions)]
    opening = [pb.RequestItem(open=pb.Open(session_id=name, model=model, policy=policy)) for name in names]
    await stream.write(pb.StreamRequest(items=opening))
    opened = 0
    while opened < sessions:
        opened += len((await stream.read()).items)
    sent = dict.fromkeys(names, time.perf_counter())
    await stream.write(pb.StreamRequest(items=[_chunk(name, 0, load) for name in names]))
    while time.perf_counter() < load.end:
        onward = []
        for item in (await stream.read()).items:
            result = item.result
            name, index = result.session_id, result.index
            load.done(index, sent[name], result.tensors[0].data)
            sent[name] = time.perf_counter()
            onward.append(_chunk(name, index + 1, load))
        await stream.write(pb.StreamRequest(items=onward))
    stream.cancel()


def _chunk(name: str, index: int, load: Load) -> pb.RequestItem:
    tensor = pb.Tensor(dtype=DATA_TYPE_FLOAT32, shape=load.shape, data=load.chunks[index % len(load.chunks)])
    return pb.RequestItem(chunk=pb.Chunk(session_id=name, index=index, tensors=[tensor]))


async def plain_stream(channel: grpc.aio.Channel, _model: str, _number: int, load: Load) -> None:
    """A by-hand server's stream: bytes of one chunk in, bytes of its answer out."""
    stream = channel.stream_stream("/byhand/Stream")()
    index = 0
    while time.perf_counter() < load.end:
        sent = time.perf_counter()
        await stream.write(load.chunks[index % len(load.chunks)])
        load.done(index, sent, await stream.read())
        index += 1
    stream.cancel()


ONE: dict[str, Callable[[grpc.aio.Channel, str, int, Load], Awaitable[None]]] = {
    "own": own_stream,
    "plain": plain_stream,
}


async def run(arguments: argparse.Namespace) -> None:
    data = np.load(arguments.data)
    load = Load(data["chunks"], data["wanted"], arguments.seconds, arguments.warmup)
    async with grpc.aio.insecure_channel(arguments.target) as channel:
        if arguments.kind == "shared":
            await shared_stream(channel, arguments.model, arguments.sessions, load)
        else:
            one = ONE[arguments.kind]
            await asyncio.gather(*(one(channel, arguments.model, n, load) for n in range(arguments.sessions)))
    print(json.dumps(load.report()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=[*ONE, "shared"])
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--data", type=Path, required=True)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
