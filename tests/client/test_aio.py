"""The asyncio client against a real server, its answers against eager PyTorch."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import torch
from tests.client.test_client import cut, frames, near
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole

import carousel_client as cc


@pytest.fixture
async def client(shared_address: str) -> AsyncIterator[cc.aio.Client]:
    async with cc.aio.connect(shared_address) as connected:
        yield connected


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that asyncio complains of is left behind: no error unseen, no task forgotten."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


async def test_stream_gives_the_eager_answer(client):
    """One answer comes for each chunk and one for the flush, and together they are the eager lookahead answer."""
    x = frames(23)

    async def live() -> AsyncIterator[np.ndarray]:
        for chunk in cut(x, 2, 9, 1, 11):
            await asyncio.sleep(0)
            yield chunk

    wanted = looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2)
    for chunks, count in ((live(), 4), (cut(x, 20, 3), 2)):
        async with client.session("tagger") as session:
            answers = [answer async for answer in session.stream(chunks)]
            assert session.policy == cc.Lookahead(4, 2)
        assert len(answers) == count + 1
        near(np.concatenate(answers), wanted)


async def test_send_infer_and_catalogue(client):
    """Single chunks, whole batches and the catalogue work as in the blocking client."""
    x = frames(5)
    async with client.session("tagger", policy=cc.Carry()) as session:
        with pytest.raises(cc.FailedPrecondition, match="ready"):
            assert session.policy
        await session.ready()
        assert (session.policy, session.version) == (cc.Carry(), "1")
        got = [await session.send(x[:2]), await session.send(x[2:], end=True)]
    near(np.concatenate(got), carried(make(Tagger), torch.from_numpy(x), [2, 3]))
    near((await client.infer("tagger", x[None]))[0], whole(make(Tagger), torch.from_numpy(x)))
    assert [model.name for model in await client.models()] == ["mixer", "speaker", "tagger"]
    assert (await client.model("tagger")).manifest.name == "tagger"
    with pytest.raises(cc.NotFound):
        await client.load("nobody")
    with pytest.raises(cc.NotFound):
        await client.unload("nobody")


async def test_a_live_source_is_answered_before_it_goes_on(client):
    """A chunk is sent and its answer given without waiting for the next chunk to exist."""
    answered = asyncio.Event()

    async def live() -> AsyncIterator[list[int]]:
        for token in (3, 1, 4):
            answered.clear()
            yield [token]
            await asyncio.wait_for(answered.wait(), 20)

    async with client.session("speaker") as session:
        answers = []
        async for answer in session.stream(live()):
            answers.append(answer)
            answered.set()
    near(np.concatenate(answers), whole(make(Speaker), torch.tensor([3, 1, 4])))


@pytest.mark.parametrize("in_flight", [1, 3])
async def test_flow_control_bounds_what_is_taken_from_the_source(client, in_flight):
    """No more than `in_flight` chunks are ahead of the answers that were taken, and that many are."""
    taken = yielded = 0
    ahead = []

    def counted() -> Iterator[list[int]]:
        nonlocal taken
        for _ in range(12):
            taken += 1
            ahead.append(taken - yielded)
            yield [taken % 11]

    async with client.session("speaker") as session:
        async for _ in session.stream(counted(), in_flight=in_flight):
            await asyncio.sleep(0.01)  # a slow reader
            yielded += 1
    assert in_flight <= max(ahead) <= in_flight + 1


async def test_many_tasks_share_one_client(client):
    """Sessions in many tasks, all on one stream, each get the answer to their own frames."""
    inputs = [frames(1 + number) for number in range(40)]

    async def run(x: np.ndarray) -> np.ndarray:
        async with client.session("tagger") as session:
            chunks = (x[at : at + 3] for at in range(0, len(x), 3))
            return np.concatenate([answer async for answer in session.stream(chunks)])

    for x, got in zip(inputs, await asyncio.gather(*map(run, inputs)), strict=True):
        near(got, looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2))


async def test_what_the_source_raises_is_raised_after_the_answers(client):
    """The answers to what a source gave come first, then its error."""

    async def broken() -> AsyncIterator[list[int]]:
        yield [1]
        yield [2]
        raise LookupError("no more")

    async with client.session("speaker") as session:
        stream = session.stream(broken())
        near(np.concatenate([await anext(stream), await anext(stream)]), whole(make(Speaker), torch.tensor([1, 2])))
        with pytest.raises(LookupError, match="no more"):
            await anext(stream)


async def test_a_refused_chunk_leaves_the_session_where_it_was(client):
    """After a chunk that the server refused, with others under way behind it, the session goes on from before it."""
    x = frames(6)
    bad = np.full((1, 5), np.nan, np.float32)
    async with client.session("tagger", policy=cc.Carry()) as session:
        with pytest.raises(cc.InvalidArgument, match="not finite"):
            async for _ in session.stream([x[:2], bad, x[:1], x[:1], x[:1]]):
                pass
        with pytest.raises(cc.InvalidArgument, match="wanted float32"):
            await session.send(x.astype(np.float64))
        got = [await session.send(x[2:3]), *[answer async for answer in session.stream([x[3:5], x[5:]])]]
    near(np.concatenate(got), carried(make(Tagger), torch.from_numpy(x), [2, 1, 2, 1])[2:])


async def test_refused_sessions(client):
    """A refusal of Open reaches whoever asks first, and on leaving if nobody did."""
    async with client.session("speaker", session_id="taken-too") as held:
        await held.ready()
        async with cc.aio.connect(client.target) as second:
            with pytest.raises(cc.AlreadyExists):
                async with second.session("speaker", session_id="taken-too"):
                    pass
            async with second.session("speaker", session_id="taken-too") as other:
                with pytest.raises(cc.AlreadyExists):
                    await anext(other.stream([[1]] * 20))


async def test_a_cancelled_caller_leaves_the_client_well(client):
    """A task that is cancelled in the middle of its stream ends its session, and others go on."""
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[list[int]]:
        yield [1]
        waiting.set()
        await asyncio.Event().wait()

    async def run() -> None:
        async with client.session("speaker") as session:
            async for _ in session.stream(endless()):
                pass

    task = asyncio.create_task(run())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with client.session("speaker") as session:
        with pytest.raises(cc.DeadlineExceeded):
            await session.send([1], timeout=0)
        near(await session.send([2]), whole(make(Speaker), torch.tensor([1, 2]))[1:])


async def test_a_server_that_stops(own_server):
    """GoingAway is kept and named by the error, which every session of the client gets, a waiting loop at once."""

    async def silent() -> AsyncIterator[list[int]]:
        yield [1]
        await asyncio.Event().wait()

    async with cc.aio.connect(own_server.address, resume_timeout=0.3) as client:
        sessions = [await client.session("speaker").__aenter__() for _ in range(3)]
        stream = sessions.pop().stream(silent())
        await anext(stream)
        for session in sessions:
            await session.send([1])
        await asyncio.to_thread(own_server.stop)
        with pytest.raises(cc.Unavailable):
            await anext(stream)
        for session in sessions:
            with pytest.raises(cc.Unavailable, match="had announced that it stops by"):
                await session.send([2])
        assert client.going_away is not None
        with pytest.raises(cc.Unavailable, match="is gone, or its connection broke"):
            await client.models()
