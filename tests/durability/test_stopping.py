"""SIGTERM while sessions stream: the order of what follows, and that nothing holds it beyond its deadline."""

import asyncio
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.client.process import ServerProcess
from tests.support.redis_server import RedisServer
from tests.support.stream import RawStream, chunk_item, close_item, open_item, reason, retry_info, rpc_status

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STREAMS, CHUNKS = 4, 30
# Long enough that some are under way whenever the signal comes.
LONG = np.arange(2000) % 11


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer("redis", tmp_path, appendfsync="no")
    yield server
    server.kill()


@pytest.fixture
def start(models: Path) -> Iterator:
    """Starts servers; all are ended."""
    servers: list[ServerProcess] = []

    def begin(**settings: object) -> ServerProcess:
        servers.append(ServerProcess(models, **settings))
        servers[-1].wait_until_served()
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


class Talk:
    """A stream with one session, whose chunks are all under way at once."""

    def __init__(self, channel: grpc.aio.Channel, name: str, *, closes: bool) -> None:
        self.name = name
        self._closes = closes
        self.stream = RawStream(channel)
        self.results: list[int] = []
        self.told: list[pb.ResponseItem] = []
        # What health said as the server said that it goes away.
        self.health = SERVING
        self.ended: grpc.aio.AioRpcError | None = None

    async def begin(self) -> None:
        await self.stream.ask(open_item(self.name, "speaker"))
        await self.stream.send(*(chunk_item(self.name, index, LONG, name="tokens") for index in range(CHUNKS)))
        assert (await self.stream.receive()).result.index == 0
        self.results.append(0)

    async def finish(self, health: health_pb2_grpc.HealthStub) -> None:
        """Read to the end; a session that `closes` does so once it has all its answers."""
        try:
            while (item := await self.stream.receive()) is not None:
                if item.HasField("result"):
                    self.results.append(item.result.index)
                    if self._closes and len(self.results) == CHUNKS:
                        await self.stream.send(close_item(self.name))
                        await self.stream.call.done_writing()
                else:
                    self.told.append(item)
                    if item.HasField("going_away"):
                        self.health = await status(health)
        except grpc.aio.AioRpcError as error:
            self.ended = error

    def kinds(self) -> list[str | None]:
        return [item.WhichOneof("item") for item in self.told]


async def status(health: health_pb2_grpc.HealthStub) -> int:
    try:
        return (await health.Check(health_pb2.HealthCheckRequest())).status
    except grpc.aio.AioRpcError:
        return NOT_SERVING  # it takes no calls any more


async def until_run(channel: grpc.aio.Channel, frames: int) -> None:
    """Until the model has run so many."""
    ran = 0
    while ran < frames:
        await asyncio.sleep(0.02)
        ran = (await CarouselStub(channel).GetModel(pb.GetModelRequest(model="speaker"))).statistics.frames


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_stopping_server_keeps_its_order(start, tmp_path, store):
    """Health turns, every stream is told, what was read is answered and written, and the process ends with 0.

    Sessions in memory are finished where they are; with a store they are handed over, and it has what was answered.
    """
    file = tmp_path / "sessions"
    server = start(store="memory" if store == "memory" else f"sqlite:{file}", drain_timeout_s=20)
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        talks = [Talk(channel, f"s{number}", closes=store == "memory") for number in range(STREAMS)]
        await asyncio.gather(*(talk.begin() for talk in talks))
        ending = asyncio.create_task(asyncio.to_thread(server.end, signal.SIGTERM))
        await asyncio.gather(*(talk.finish(health) for talk in talks))
        assert (await watch.read()).status == NOT_SERVING
        assert await ending == 0, server.log
    for talk in talks:
        assert talk.health == NOT_SERVING
        assert talk.results == list(range(len(talk.results)))
        if store == "memory":
            assert talk.kinds() == ["going_away", "closed"]
            assert len(talk.results) == CHUNKS
            assert talk.ended is None
        else:
            assert talk.kinds() == ["going_away"]
            assert reason(rpc_status(talk.ended)) == "DRAINING"
            assert retry_info(rpc_status(talk.ended)) is not None
    if store == "sqlite":
        again = start(store=f"sqlite:{file}")
        async with grpc.aio.insecure_channel(again.address) as channel, RawStream(channel) as stream:
            for talk in talks:
                opened = (await stream.ask(open_item(talk.name, "speaker", resume=True))).opened
                assert opened.next_index == len(talk.results)
    assert not any("Traceback" in line for line in server.log)


@pytest.mark.parametrize(("store", "code"), [("memory", 1), ("sqlite", 0)])
async def test_a_client_that_never_reads_holds_no_stop(start, tmp_path, store, code):
    """Megabytes that nobody reads are cut off: after the drain time in memory, and at once where a store has them."""
    settings = {"store": "memory", "drain_timeout_s": 1}
    if store == "sqlite":
        settings = {"store": f"sqlite:{tmp_path / 'sessions'}", "drain_timeout_s": 60}
    server = start(**settings)
    async with grpc.aio.insecure_channel(server.address) as channel, grpc.aio.insecure_channel(server.address) as other:
        deaf = CarouselStub(channel).Stream()
        for number in range(8):
            items = [open_item(f"s{number}", "speaker")]
            items += [chunk_item(f"s{number}", index, LONG, name="tokens") for index in range(CHUNKS)]
            await deaf.write(pb.StreamRequest(items=items))
        await until_run(other, 4 * CHUNKS * len(LONG))
        began = time.monotonic()
        assert await asyncio.to_thread(server.end, signal.SIGTERM) == code, server.log
        assert time.monotonic() - began < 20
        deaf.cancel()
    said = "Error: stopped by the deadline, with something undone: 8 sessions had not ended, and are gone\n"
    assert (said in server.log) == (code == 1)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_a_store_that_hangs_holds_no_stop(start, tmp_path, redis, kind):
    """With a store that answers nothing the process ends by its deadline, says what it could not write, and exits 1.

    The client was not told of it either: it sends its chunk again elsewhere.
    """
    file = tmp_path / "sessions"
    store = f"sqlite:{file}" if kind == "sqlite" else redis.url
    server = start(store=store, drain_timeout_s=1)
    async with grpc.aio.insecure_channel(server.address) as channel, RawStream(channel) as stream:
        await stream.ask(open_item("s", "speaker"))
        assert (await stream.ask(chunk_item("s", 0, [1, 2], name="tokens"))).result.index == 0
        with closing(sqlite3.connect(file if kind == "sqlite" else ":memory:", isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            redis.pause()
            await stream.send(chunk_item("s", 1, [3], name="tokens"))
            await until_run(channel, 3)
            began = time.monotonic()
            assert await asyncio.to_thread(server.end, signal.SIGTERM) == 1
            assert time.monotonic() - began < 20
            redis.go_on()
    assert any("left undone: 1 sessions could not be written to the store" in line for line in server.log), server.log
    assert not any("Traceback" in line for line in server.log), server.log
    again = start(store=store)
    async with grpc.aio.insecure_channel(again.address) as channel, RawStream(channel) as stream:
        assert (await stream.ask(open_item("s", "speaker", resume=True))).opened.next_index in (1, 2)


async def test_what_was_answered_is_written_before_its_stream_ends(start, redis):
    """Also with --durability drain another server has a session as it was answered, once its stream has ended."""
    first, second = (start(store=redis.url, durability="drain", drain_timeout_s=20) for _ in range(2))
    names = [f"s{number}" for number in range(40)]
    async with (
        grpc.aio.insecure_channel(first.address) as channel,
        grpc.aio.insecure_channel(second.address) as other,
        RawStream(channel) as stream,
    ):
        for name in names:
            await stream.ask(open_item(name, "speaker"))
            assert (await stream.ask(chunk_item(name, 0, [1, 2], name="tokens"))).result.index == 0
        ending = asyncio.create_task(asyncio.to_thread(first.end, signal.SIGTERM))
        assert (await stream.receive()).HasField("going_away")
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.receive()
        async with RawStream(other) as elsewhere:
            for name in names:
                item = await elsewhere.ask(open_item(name, "speaker", resume=True))
                assert item.opened.next_index == 1, item
        assert await ending == 0
