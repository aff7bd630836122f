"""A server's memory while sessions are opened, streamed, left alone, found again and forgotten."""

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import grpc
import numpy as np
from soak.errors import SoakError
from soak.processes import rss_mb
from soak.reference import Reference, references
from soak.work import Array, draw
from tests.client.process import ServerProcess, serving
from tests.support.stream import chunk_item, open_item

import carousel_client as cc
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

# Small bounds, so that whatever is bounded reaches its bound while the server warms up.
SETTINGS = {"cold_after_s": 3, "idle_timeout_s": 30, "max_sessions": 200}
CHUNKS = 12
SAMPLE_S = 2.0
# Of what it was in the first minute after the warm-up.
FLAT = 0.05


@dataclass
class Memory:
    """What was found. `rss_mb` has (minutes, MB); `did` counts what sessions did."""

    minutes: float
    warm_up_minutes: float
    seed: int
    worst_eager_error: float
    base_mb: float = 0.0
    lowest_mb: float = 0.0
    highest_mb: float = 0.0
    did: dict[str, int] = field(default_factory=dict)
    differing: int = 0
    rss_mb: list[tuple[float, float]] = field(default_factory=list)

    def judge(self) -> None:
        """Raise `SoakError` where an answer differs, or memory left its band after the warm-up."""
        warm = [mb for at, mb in self.rss_mb if at >= self.warm_up_minutes]
        self.base_mb = median(mb for at, mb in self.rss_mb if 0 <= at - self.warm_up_minutes <= 1)
        self.lowest_mb, self.highest_mb = min(warm), max(warm)
        if self.differing:
            raise SoakError(f"{self.differing} answers are not those of an undisturbed server")
        if self.highest_mb > self.base_mb * (1 + FLAT) or self.lowest_mb < self.base_mb * (1 - FLAT):
            raise SoakError(
                f"memory was {self.lowest_mb:.1f} to {self.highest_mb:.1f} MB after the warm-up, "
                f"which is not within {FLAT:.0%} of {self.base_mb:.1f} MB"
            )


class LastingStream:
    """One `Stream` call for the whole soak, on which sessions are opened and left alone; what it is told is dropped."""

    def __init__(self, stub: CarouselStub) -> None:
        self._call = stub.Stream()
        # gRPC takes one write at a time.
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def send(self, *items: pb.RequestItem) -> None:
        async with self._writing:
            await self._call.write(pb.StreamRequest(items=items))

    async def _read(self) -> None:
        while await self._call.read() is not grpc.aio.EOF:
            pass

    async def close(self) -> None:
        self._call.cancel()
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await self._reader


class Traffic:
    """What a session can do, each a coroutine."""

    def __init__(self, client: cc.aio.Client, stub: CarouselStub, found: Sequence[Reference], seed: int) -> None:
        self.did: Counter[str] = Counter()
        self.differing = 0
        self._client, self._stub, self._found = client, stub, found
        self._lasting = LastingStream(stub)
        self._random = random.Random(seed)
        self._fates: list[tuple[Callable[[Reference], Awaitable[None]], float]] = [
            (self.finished, 4),
            (self.cold, 2),
            (self.left_alone, 3),
            (self.broken, 2),
            (self.branched, 1),
            (self.whole, 1),
        ]

    async def one(self) -> None:
        fates, weights = zip(*self._fates, strict=True)
        (fate,) = self._random.choices(fates, weights)
        await fate(self._random.choice(self._found))
        self.did[fate.__name__] += 1

    async def close(self) -> None:
        await self._lasting.close()

    def _compare(self, reference: Reference, answers: Sequence[object]) -> None:
        self.differing += reference.differing([np.asarray(answer) for answer in answers])

    async def finished(self, reference: Reference) -> None:
        """Streamed to its end, and closed."""
        async with self._client.session(reference.work.model, policy=reference.work.policy) as session:
            self._compare(reference, [answer async for answer in session.stream(list(reference.work.chunks))])

    async def cold(self, reference: Reference) -> None:
        """Streamed with a pause in which it leaves memory."""

        async def chunks() -> AsyncIterator[Array]:
            for number, chunk in enumerate(reference.work.chunks):
                if number == CHUNKS // 2:
                    await asyncio.sleep(self._random.uniform(5, 8))
                yield chunk

        async with self._client.session(reference.work.model, policy=reference.work.policy) as session:
            self._compare(reference, [answer async for answer in session.stream(chunks())])

    async def left_alone(self, reference: Reference) -> None:
        """Opened on a stream that goes on, streamed a little, and never asked for again."""
        name, some = self._name(), self._random.randint(0, 6)
        chunks = [chunk_item(name, index, chunk) for index, chunk in enumerate(reference.work.chunks[:some])]
        await self._lasting.send(open_item(name, reference.work.model), *chunks)

    async def broken(self, reference: Reference) -> None:
        """Its stream ends without a word, in the middle of its chunks."""
        name = self._name()
        call = self._stub.Stream()
        chunks = [chunk_item(name, index, chunk) for index, chunk in enumerate(reference.work.chunks[:8])]
        await call.write(pb.StreamRequest(items=[open_item(name, reference.work.model), *chunks]))
        await call.read()
        call.cancel()

    async def branched(self, reference: Reference) -> None:
        """Forked, read and put again under another name; the branches are left alone."""
        async with self._client.session(reference.work.model, policy=reference.work.policy) as session:
            for chunk in reference.work.chunks[:4]:
                await session.send(chunk)
            await self._client.fork(session.id)
            await self._client.put_state(await self._client.get_state(session.id), session_id=self._name())

    async def whole(self, reference: Reference) -> None:
        """An Infer call of a random shape."""
        frames = np.concatenate(reference.work.chunks)[: self._random.randint(1, 80)]
        rows = self._random.randint(1, 12)
        lengths = [self._random.randint(1, len(frames)) for _ in range(rows)]
        await self._client.infer(reference.work.model, np.stack([frames] * rows), lengths=lengths)

    def _name(self) -> str:
        return f"{self._random.getrandbits(64):016x}"


@asynccontextmanager
async def _traffic(address: str, found: Sequence[Reference], seed: int) -> AsyncIterator[Traffic]:
    async with cc.aio.connect(address) as client, grpc.aio.insecure_channel(address) as channel:
        traffic = Traffic(client, CarouselStub(channel), found, seed)
        try:
            yield traffic
        finally:
            await traffic.close()


async def _drive(server: ServerProcess, minutes: float, warm_up: float, rate: float, seed: int) -> Memory:
    found, worst = await references(server.address, draw(21, CHUNKS, seed))
    memory = Memory(minutes, warm_up, seed, worst)
    began = time.monotonic()
    rng = random.Random(seed + 1)
    async with _traffic(server.address, found, seed) as traffic, asyncio.TaskGroup() as sessions:
        sampled = 0.0
        while (past := time.monotonic() - began) < minutes * 60:
            if past >= sampled:
                memory.rss_mb.append((round(past / 60, 3), round(rss_mb(server.pid), 2)))
                sampled = past + SAMPLE_S
            sessions.create_task(traffic.one())
            await asyncio.sleep(rng.expovariate(rate))
    memory.did, memory.differing = dict(traffic.did), traffic.differing
    return memory


def soak(models: Path, *, minutes: float, rate: float, seed: int) -> Memory:
    """Sessions begin `rate` times a second for `minutes`. The first fifth is the warm-up, five minutes at most.

    Raises `SoakError` where memory is not flat after it, an answer differs, or the server's log has a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        with serving(models, store=f"sqlite:{folder}/sessions?synchronous=normal", **SETTINGS) as server:
            memory = asyncio.run(_drive(server, minutes, min(5.0, minutes / 5), rate, seed))
        if "Traceback" in (log := "".join(server.log)):
            raise SoakError(f"the server's log has a traceback: {log[-2000:]}")
    return memory
