"""What a client that goes on by itself does beside that: to whom it yields, when it gives up, where it goes."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.process import serving
from tests.support.models import Speaker, Tagger, make, whole
from tests.support.proxy import Cut, proxied
from tests.support.stream import RawStream, chunk_item, close_item, open_item, reason

import carousel_client as cc
from carousel_client.backoff import FIRST_S, MOST_S, Backoff
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.serve import Server

TOKENS = np.arange(30) % 11
WANTED = whole(make(Speaker), torch.from_numpy(TOKENS)).numpy()


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with serving(models) as server:
        yield server.address


def near(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@given(st.floats(0.01, 500), st.lists(st.floats(0, 3), max_size=200))
def test_delays_grow_are_drawn_and_end(total, pauses):
    """Each delay is at most twice the bound of the one before, never over the most, and none ends after the total."""
    backoff, now, begun = Backoff(total), 100.0, 100.0
    for attempt, pause in enumerate(pauses):
        delay = backoff.delay(now)
        if delay is None:
            assert now - begun >= total
            return
        assert 0 <= delay <= min(MOST_S, FIRST_S * 2**attempt)
        assert now + delay - begun <= total * (1 + 1e-9) + 1e-9
        now += delay + pause


def test_delays_of_many_clients_differ():
    """Clients that fail together do not come back together."""
    delays = [backoff.delay(0) for backoff in [Backoff(60) for _ in range(50)] for _ in range(8)]
    assert len(set(delays)) == len(delays)


def test_it_gives_up_in_the_end(address):
    """A server that stays away fails the sessions after `resume_timeout`, whose error says so; 0 is at once."""
    for timeout, said in ((0.4, "was not back within resume_timeout, 0.4 s"), (0, "is gone, or its connection broke")):
        with proxied(address) as proxy, cc.connect(proxy.address, resume_timeout=timeout) as client:
            sessions = [client.session("speaker").__enter__() for _ in range(2)]
            for session in sessions:
                session.send(TOKENS[:3])
            proxy.open = False
            proxy.cut()
            began = time.monotonic()
            for session in sessions:
                with pytest.raises(cc.Unavailable, match=said):
                    session.send(TOKENS[3:6])
            assert time.monotonic() - began >= timeout
            proxy.open = True
            with client.session("speaker") as session:
                near(session.send(TOKENS), WANTED)


@pytest.mark.parametrize("while_away", [False, True])
def test_a_fenced_client_does_not_fight(address, while_away):
    """An older client that has lost its session to a newer one is told `Fenced`, for good, even if it was away then."""
    name = f"shared-{while_away}"
    with proxied(address) as proxy, cc.connect(proxy.address) as older, cc.connect(address) as newer:
        mine = older.session("speaker", session_id=name).__enter__()
        got = [mine.send(TOKENS[:5]), mine.send(TOKENS[5:9])]
        if while_away:
            proxy.open = False
            proxy.cut()
        with newer.session("speaker", session_id=name, resume=True) as theirs:
            assert theirs.next_index == 2
            got.append(theirs.send(TOKENS[9:20]))
            proxy.open = True
            for _ in range(2):
                with pytest.raises(cc.Fenced) as caught:
                    mine.send(TOKENS[9:12])
                assert isinstance(caught.value, cc.Aborted)
            proxy.cut()
            got.append(theirs.send(TOKENS[20:]))
        near(np.concatenate(got), WANTED)


async def test_a_session_is_taken_up_by_another_process(address):
    """A client that resumes a session by name learns where to go on, and can be cut off as well."""
    async with cc.aio.connect(address) as first:
        session = await first.session("speaker", session_id="handed-on").__aenter__()
        got = [await session.send(TOKENS[at : at + 4]) for at in (0, 4, 8)]
        assert session.next_index == 0
    with proxied(address) as proxy:
        async with cc.aio.connect(proxy.address) as second:
            async with second.session("speaker", session_id="handed-on", resume=True) as session:
                await session.ready()
                assert session.next_index == 3
                proxy.plan(Cut("to client", 20))
                got += [await session.send(TOKENS[at : at + 6]) for at in (12, 18, 24)]
            assert proxy.cuts == 1
            with pytest.raises(cc.FailedPrecondition):
                async with second.session("speaker", session_id="handed-on", resume=True) as session:
                    await session.ready()
            with pytest.raises(cc.SessionNotFound):
                async with second.session("speaker", session_id="never-there", resume=True) as session:
                    await session.send([1])
    near(np.concatenate(got), WANTED)
    with pytest.raises(ValueError, match="session_id"), cc.connect(address) as client:
        client.session("speaker", resume=True)


def test_a_server_that_was_restarted_without_a_store(models: Path):
    """Sessions of which nothing was answered yet begin anew; the others are told what keeps sessions, once each."""
    with serving(models) as first, proxied(first.address) as proxy, cc.connect(proxy.address) as client:
        begun = client.session("speaker").__enter__()
        begun.send(TOKENS[:3])
        proxy.open = False
        proxy.cut()
        with serving(models) as second:
            fresh = client.session("speaker").__enter__()
            answer: list[np.ndarray] = []
            sending = threading.Thread(target=lambda: answer.append(fresh.send(TOKENS)))
            sending.start()
            proxy.target, proxy.open = second.address, True
            with pytest.raises(cc.SessionNotFound, match=r"answered up to chunk 1.*--store"):
                begun.send(TOKENS[3:])
            begun.__exit__(None, None, None)
            sending.join(30)
            near(answer[0], WANTED)
            fresh.__exit__(None, None, None)


async def test_new_sessions_go_elsewhere_when_a_server_stops(models: Path):
    """After GoingAway a session that is opened goes to a connection of its own, and the older one ends where it is."""
    with (
        serving(models, drain_timeout_s=30) as first,
        serving(models) as second,
        proxied(first.address) as proxy,
    ):
        async with cc.aio.connect(proxy.address) as client:
            async with client.session("speaker") as old:
                got = [await old.send(TOKENS[:7])]
                proxy.target = second.address
                stopping = asyncio.create_task(asyncio.to_thread(first.stop))
                while client.going_away is None:  # noqa: ASYNC110 -- a client has no event for it
                    await asyncio.sleep(0.01)
                async with client.session("speaker") as new:
                    near(await new.send(TOKENS), WANTED)
                assert not stopping.done()
                got.append(await old.send(TOKENS[7:]))
                near(np.concatenate(got), WANTED)
            assert await stopping == 0
            async with cc.aio.connect(second.address) as other:
                assert (await other.model("speaker")).statistics.frames == len(TOKENS)


async def test_a_session_that_a_stopping_server_refuses_is_opened_elsewhere(models: Path):
    """A client that meets a server which stops tries again until another one is there, for that session alone."""
    with serving(models, drain_timeout_s=30) as first, serving(models) as second, proxied(first.address) as proxy:
        async with cc.aio.connect(first.address) as holds, cc.aio.connect(proxy.address) as client:
            await client.model("speaker")
            async with holds.session("speaker") as holding:
                await holding.send([1])
                stopping = asyncio.create_task(asyncio.to_thread(first.stop))
                while holds.going_away is None:  # noqa: ASYNC110 -- a client has no event for it
                    await asyncio.sleep(0.01)
                async with client.session("speaker") as session:
                    answer = asyncio.create_task(session.send(TOKENS))
                    await asyncio.sleep(0.3)
                    assert not answer.done()
                    proxy.target = second.address
                    near(await answer, WANTED)
                    assert proxy.cuts == 0
            assert await stopping == 0


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_more_chunks_than_the_window_wait_in_order(models: Path, kind):
    """Chunks beyond what a server lets be unacknowledged wait to be sent; none is refused, and all keep their order."""
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    with serving(models, max_pending_chunks=8) as server:
        if kind == "asyncio":
            async with cc.aio.connect(server.address) as client, client.session("tagger", policy=cc.Full()) as session:
                await asyncio.gather(*(session.send(x[at : at + 1]) for at in range(60)))
                got = await session.send(end=True)
        else:
            with cc.connect(server.address) as client, client.session("tagger", policy=cc.Full()) as session:
                *_, got = session.stream((x[at : at + 1] for at in range(60)), in_flight=50)
    near(got, whole(make(Tagger), torch.from_numpy(x)).numpy())


async def test_open_can_be_repeated_by_its_holder_alone(channel: grpc.aio.Channel):
    """The same Open again is answered with Opened; another holder's is ALREADY_EXISTS, and FENCED once it had it."""
    async with RawStream(channel) as first, RawStream(channel) as second:
        assert (await first.ask(open_item("o", "speaker", holder="a"))).opened.window >= 8
        again = (await second.ask(open_item("o", "speaker", holder="a"))).opened
        assert (again.epoch, again.next_index) == (2, 0)
        assert reason((await first.receive()).failed.status) == "FENCED"
        for holder in ("b", ""):
            refused = await first.ask(open_item("o", "speaker", holder=holder))
            assert reason(refused.failed.status) == "SESSION_EXISTS"
        assert (await first.ask(open_item("o", "speaker", holder="b", resume=True))).opened.epoch == 3
        assert reason((await second.receive()).failed.status) == "FENCED"
        for resume in (True, False):
            refused = await second.ask(open_item("o", "speaker", holder="a", resume=resume, epoch=2))
            assert reason(refused.failed.status) == "FENCED"
        assert (await first.ask(chunk_item("o", 0, TOKENS))).HasField("result")


async def test_a_closed_session_answers_a_late_retry(channel: grpc.aio.Channel):
    """What a closed session's client did not acknowledge can be had again after Closed, until it is acknowledged."""

    def chunk(index: int) -> pb.RequestItem:
        item = chunk_item("late", index, TOKENS[index : index + 1], end=index == 2)
        item.chunk.acknowledged = 0
        return item

    async with RawStream(channel) as stream:
        await stream.send(open_item("late", "speaker", holder="a"), *map(chunk, range(3)), close_item("late"))
        answers = [await stream.receive() for _ in range(5)]
        assert answers[-1].HasField("closed")
    async with RawStream(channel) as stream:
        items = (open_item("late", "speaker", holder="a", epoch=1), *map(chunk, range(3)), close_item("late"))
        await stream.send(*items)
        again = [await stream.receive() for _ in range(5)]
        assert again[0].opened.next_index == 3
        assert again[1:] == answers[1:]
        refused = await stream.ask(chunk_item("late", 3, TOKENS[:1]))
        assert reason(refused.failed.status) == "SESSION_CLOSED"
        assert (await stream.ask(open_item("late", "speaker", holder="a", epoch=2))).opened.epoch == 3
        done = close_item("late")
        done.close.acknowledged = 3
        assert (await stream.ask(done)).HasField("closed")
        refused = await stream.ask(open_item("late", "speaker", holder="a", resume=True))
        assert reason(refused.failed.status) == "SESSION_CLOSED"


async def test_what_closed_sessions_leave_goes_with_their_model(channel: grpc.aio.Channel, server: Server):
    """A model is unloaded without regard to answers that nobody may ask for any more."""
    async with RawStream(channel) as stream:
        await stream.send(open_item("left", "speaker"), chunk_item("left", 0, TOKENS, end=True), close_item("left"))
        assert [(await stream.receive()).WhichOneof("item") for _ in range(3)] == ["opened", "result", "closed"]
        assert (await stream.ask(open_item("left", "speaker", resume=True))).opened.next_index == 1
        await CarouselStub(channel).UnloadModel(pb.UnloadModelRequest(model="speaker"))
        refused = await stream.ask(open_item("left", "speaker", resume=True))
        assert reason(refused.failed.status) == "SESSION_CLOSED"
