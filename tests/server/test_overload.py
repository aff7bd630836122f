"""More work than the server can do: what waits is bounded, who is refused can come again, nobody pays for others."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from tests.support.stream import (
    RawStream,
    array,
    chunk_item,
    close_item,
    open_item,
    policy,
    reason,
    retry_info,
    rpc_status,
    tensor,
)

import carousel_client as cc
from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.engine.model import Model
from carousel_server.engine.session import Session
from carousel_server.engine.steps import Steps
from carousel_server.serve import Server

CARRY = policy("carry")
# Of the tagger: 5 floats in, 3 out.
CHUNK = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)


@contextmanager
def slow(server: Server, seconds: float) -> Iterator[None]:
    """Each of the tagger's steps takes so long."""
    runner = server.engine.catalogue.get("tagger").steps._runner
    run = runner.run

    def slowly(batch):
        time.sleep(seconds)
        return run(batch)

    runner.run = slowly
    yield
    runner.run = run


@pytest.mark.settings(max_block_frames=16)
async def test_a_long_chunk_delays_others_by_one_step_at_most(channel: grpc.aio.Channel, server: Server, monkeypatch):
    """While a causal chunk of 10,000 frames runs, what another session sends waits for one of its steps at most."""
    log: list[set[str]] = []
    submit, schedule = Model.submit, Steps._schedule

    def submitting(model, session, *args, **options):
        log.append({f"came {session.id}"})
        submit(model, session, *args, **options)

    def scheduling(steps):
        turn = schedule(steps)
        if turn is not None:
            log.append({block.owner.id for block in turn.step.blocks})
        return turn

    monkeypatch.setattr(Model, "submit", submitting)
    monkeypatch.setattr(Steps, "_schedule", scheduling)
    async with RawStream(channel) as long, RawStream(channel) as short:
        await long.ask(open_item("long", "speaker"))
        await short.ask(open_item("short", "speaker"))
        await long.send(chunk_item("long", 0, np.zeros(10_000, np.int64)))
        for index in range(20):
            assert (await short.ask(chunk_item("short", index, np.zeros(3, np.int64)))).result.frames == 3
        answer = await long.receive()
        assert answer is not None
        assert answer.result.frames == 10_000
    came = [position for position, entry in enumerate(log) if entry == {"came short"}]
    ended = max(position for position, entry in enumerate(log) if "long" in entry)
    assert sum("long" in entry for entry in log) == 625
    assert len([position for position in came if position < ended]) >= 10
    for position in came:
        steps = [entry for entry in log[position + 1 :] if not any(name.startswith("came") for name in entry)]
        assert any("short" in entry for entry in steps[:2])  # the first may be that of a block which came before


@pytest.mark.settings(max_pending_bytes=200_000)
async def test_what_waits_is_bounded_over_all_sessions(channel: grpc.aio.Channel, server: Server):
    """A session that fills its share is refused with a time to retry, others are not, and its state has not moved."""
    budget = server.engine.budget
    async with RawStream(channel) as hog, RawStream(channel) as other:
        await hog.ask(open_item("hog", "tagger", policy=CARRY), open_item("alone", "tagger", policy=CARRY))
        await hog.receive()
        await other.ask(open_item("other", "tagger", policy=CARRY))
        with slow(server, 0.3):
            await hog.send(*(chunk_item("hog", index, CHUNK) for index in range(40)))
            refused = await hog.receive()
            assert refused is not None
            assert reason(refused.failed.status) == "QUEUE_FULL"
            assert retry_info(refused.failed.status) is not None
            taken = refused.failed.index
            assert 0 < taken < 20
            await other.send(chunk_item("other", 0, CHUNK))
            assert 0 < budget.held <= budget.total
            items = [await hog.receive() for _ in range(39)]
            answers = [item.result for item in items if item.HasField("result")]
            # Those behind the first that was refused are gaps, or found the queue as full.
            assert [answer.index for answer in answers] == list(range(taken))
            assert (await other.receive()).result.frames == 50
        got = [array(answer.tensors[0]) for answer in answers]
        got += [
            array((await hog.ask(chunk_item("hog", index, CHUNK))).result.tensors[0]) for index in (taken, taken + 1)
        ]
        wanted = [
            array((await hog.ask(chunk_item("alone", index, CHUNK))).result.tensors[0]) for index in range(len(got))
        ]
        np.testing.assert_array_equal(got, wanted)
        assert budget.held == 0


@pytest.mark.settings(max_pending_bytes=200_000)
async def test_the_bound_is_given_back_however_a_session_ends(channel: grpc.aio.Channel, server: Server):
    """Frames that wait count no more once their session was answered, closed, abandoned or withdrawn."""
    budget = server.engine.budget
    async with RawStream(channel) as stream:
        for name in ("closed", "full", "abandoned"):
            await stream.ask(open_item(name, "tagger", policy=policy("full")))
            await stream.ask(chunk_item(name, 0, CHUNK[:20]))
        held = budget.held
        assert held >= 3 * 20 * (5 + 3) * 4
        await stream.ask(close_item("closed"))
        assert budget.held < held
        await stream.ask(chunk_item("full", 1, end=True))
        with slow(server, 0.2):
            await stream.ask(open_item("withdrawn", "tagger", policy=CARRY))
            await stream.send(*(chunk_item("withdrawn", index, CHUNK) for index in range(3)))
            await asyncio.sleep(0.1)
            stream.call.cancel()
            await asyncio.sleep(0.5)
    assert budget.held == 20 * (5 + 3) * 4 * 1  # of the one that was abandoned, which expires
    server.engine.sessions.expire(time.monotonic() + 10_000)
    assert budget.held == 0


@pytest.mark.settings(max_pending_bytes=200_000)
async def test_a_chunk_or_request_that_can_never_be_taken_says_so(channel: grpc.aio.Channel):
    """What is larger than anybody's share is TOO_LARGE, without a time to retry, and the session goes on."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=CARRY))
        item = await stream.ask(chunk_item("s", 0, np.zeros((2000, 5), np.float32)))
        assert (reason(item.failed.status), retry_info(item.failed.status)) == ("TOO_LARGE", None)
        assert (await stream.ask(chunk_item("s", 0, CHUNK))).result.frames == 50
    request = pb.InferRequest(model="tagger", tensors=[tensor(np.zeros((20, 100, 5), np.float32), "x")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await CarouselStub(channel).Infer(request)
    assert reason(rpc_status(caught.value)) == "TOO_LARGE"


@pytest.mark.settings(max_pending_bytes=200_000)
async def test_infer_is_refused_while_too_many_bytes_wait(channel: grpc.aio.Channel, server: Server):
    """Of many requests at once those over the bound are told to come again, and when; the others are answered."""
    stub = CarouselStub(channel)
    request = pb.InferRequest(model="tagger", tensors=[tensor(np.zeros((4, 50, 5), np.float32), "x")])

    async def ask() -> str:
        try:
            await stub.Infer(request)
        except grpc.aio.AioRpcError as error:
            status = rpc_status(error)
            assert retry_info(status) is not None
            return reason(status)
        return "answered"

    with slow(server, 0.2):
        told = Counter(await asyncio.gather(*(ask() for _ in range(60))))
    assert set(told) == {"answered", "QUEUE_FULL"}
    assert told["answered"] >= 8
    assert await ask() == "answered"
    assert server.engine.budget.held == 0


@pytest.mark.settings(max_pending_bytes=100_000)
async def test_the_client_sends_again_what_found_a_full_queue(server: Server, monkeypatch):
    """Forty sessions against a bound far too small for them have every answer, once, and no caller sees a refusal."""
    refused = Counter[str]()
    refuse = Session._refuse_size

    def counting(session: Session, size: int) -> None:
        refused[session.id] += 1
        refuse(session, size)

    monkeypatch.setattr(Session, "_refuse_size", counting)
    async with cc.aio.connect(f"127.0.0.1:{server.port}") as client:
        async with client.session("tagger", policy=cc.Carry()) as alone:
            wanted = [await alone.send(CHUNK[:20]) for _ in range(6)]

        async def stream() -> list[np.ndarray]:
            async with client.session("tagger", policy=cc.Carry()) as session:
                return [y async for y in session.stream([CHUNK[:20]] * 6, in_flight=8)][:6]

        with slow(server, 0.02):
            everyone = await asyncio.gather(*(stream() for _ in range(40)))
    assert len(refused) >= 5
    for got in everyone:
        np.testing.assert_array_equal(got, wanted)
    assert server.engine.budget.held == 0


@pytest.mark.settings(max_pending_bytes=4_000_000)
async def test_clients_that_never_read_hold_no_more_than_the_bound_together(server: Server):
    """Ten streams that ask for what they do not read keep within the bound, and another's chunks are all answered."""
    budget, target = server.engine.budget, f"127.0.0.1:{server.port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as bad, grpc.aio.insecure_channel(target) as good:
        stalled = [RawStream(bad) for _ in range(10)]
        for number, stream in enumerate(stalled):
            await stream.ask(open_item(f"{number}", "tagger", policy=CARRY))
            await stream.ask(chunk_item(f"{number}", 0, np.zeros((2000, 5), np.float32)))
        repeats = [pb.StreamRequest(items=[chunk_item(f"{number}", 0)] * 500) for number in range(10)]
        sending = [asyncio.create_task(stream.call.write(each)) for stream, each in zip(stalled, repeats, strict=True)]
        async with RawStream(good) as other:
            await other.ask(open_item("other", "tagger", policy=CARRY))
            for index in range(40):
                assert (await other.ask(chunk_item("other", index, CHUNK))).result.index == index
            assert sum(call._waiting_bytes for call in server._native._calls) > budget.total / 10
            assert budget.held < budget.total
        for task in sending:
            task.cancel()
        for stream in stalled:
            stream.call.cancel()
    await asyncio.sleep(0.5)
    assert budget.held == 0
