"""What gRPC for Python costs by itself, `python -m bench.floor`: streams that answer each message at once, with no run.

128 streams in closed loop, messages of the size of a chunk and of its answer, bytes in and bytes out. CPU microseconds
of the server per message: what a server on grpc.aio costs for each chunk that has a message of its own, before it does
anything.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from bench.machine import describe
from bench.sizes import COMPARED, FRAMES, SIZES

STREAMS, ANSWER = 128, FRAMES * 32 * 4
_TICKS = os.sysconf("SC_CLK_TCK")


async def serve() -> None:
    async def echo(requests: AsyncIterator[bytes], context: Any) -> None:
        async for _ in requests:
            await context.write(bytes(ANSWER))

    server = grpc.aio.server()
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def load(port: int, size: int, seconds: float) -> int:
    """Messages answered."""
    answered, chunk, end = 0, bytes(size), time.perf_counter() + seconds

    async def one(channel: grpc.aio.Channel) -> None:
        nonlocal answered
        stream = channel.stream_stream("/floor/Stream")()
        while time.perf_counter() < end:
            await stream.write(chunk)
            await stream.read()
            answered += 1
        stream.cancel()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.gather(*(one(channel) for _ in range(STREAMS)))
    return answered


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(rounds: int, seconds: float) -> dict[str, float]:
    """CPU microseconds per message, by model: the median over rounds."""
    server = subprocess.Popen([sys.executable, "-m", "bench.floor", "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        found: dict[str, list[float]] = {model: [] for model in COMPARED}
        for _ in range(rounds):
            for model in COMPARED:
                before = cpu_seconds(server.pid)
                answered = uvloop.run(load(port, FRAMES * SIZES[model][0] * 4, seconds))
                found[model].append((cpu_seconds(server.pid) - before) / answered * 1e6)
        return {model: round(statistics.median(values), 1) for model, values in found.items()}
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/floor.json"))
    given = parser.parse_args()
    if given.serve:
        uvloop.run(serve())
        return
    floor = measure(given.rounds, given.seconds)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": describe(), "cpu_us_per_message": floor}, indent=1) + "\n")
    print(f"CPU µs per message of grpc.aio alone, {STREAMS} streams: {floor}")


if __name__ == "__main__":
    main()
