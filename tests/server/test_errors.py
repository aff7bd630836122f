"""The blueprint's table of errors: each condition, its status, its stable reason, and nothing lost."""

import asyncio
import time

import grpc
import numpy as np
import pytest
from tests.support.stream import (
    RawStream,
    chunk_item,
    close_item,
    open_item,
    policy,
    reason,
    retry_info,
    rpc_status,
    tensor,
)

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.serve import Server

GOOD = np.zeros((3, 5), np.float32)
CODES = {code.name: code.value[0] for code in grpc.StatusCode}


def failed(item: pb.ResponseItem, code: str, why: str) -> str:
    """Check a Failed item, and give its message."""
    assert item.HasField("failed"), item
    status = item.failed.status
    assert (status.code, reason(status)) == (CODES[code], why), status
    assert "Traceback" not in status.message
    assert "\n" not in status.message
    return status.message


# fmt: off
REFUSED = [
    (open_item("x", "nobody"), "NOT_FOUND", "MODEL_NOT_FOUND", "tagger"),
    (open_item("x", "tagger", version="9"), "NOT_FOUND", "MODEL_NOT_FOUND", "it has 1"),
    (open_item("x", "tagger", resume=True), "NOT_FOUND", "SESSION_NOT_FOUND", "'x'"),
    (open_item("s", "tagger"), "ALREADY_EXISTS", "SESSION_EXISTS", "resume it"),
    (open_item("x" * 129, "tagger"), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "128"),
    (open_item("a\nb", "tagger"), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "printable"),
    (open_item("x", "tagger", policy=policy("causal")), "INVALID_ARGUMENT", "POLICY_NOT_ALLOWED", "carry"),
    (open_item("x", "tagger", policy=policy("full", 3)), "INVALID_ARGUMENT", "POLICY_NOT_ALLOWED", "leave them"),
    (open_item("x", "tagger", policy=policy("lookahead", 0, 3)), "INVALID_ARGUMENT", "POLICY_NOT_ALLOWED", "block"),
    (open_item("x", "tagger", policy=policy("lookahead", 9999, 9999)),
     "INVALID_ARGUMENT", "POLICY_NOT_ALLOWED", "19998"),
    (open_item("x", "tagger", initial_state=[tensor(GOOD, "lstm.h")]),
     "INVALID_ARGUMENT", "BAD_TENSOR", "lstm.h_0"),
    (open_item("x", "tagger", initial_state=[tensor(GOOD, "lstm.h_0")]),
     "INVALID_ARGUMENT", "BAD_TENSOR", "[4, 7]"),
    (chunk_item("nobody", 0, GOOD), "NOT_FOUND", "SESSION_NOT_FOUND", "nobody"),
    (chunk_item("s", 2, GOOD), "FAILED_PRECONDITION", "INDEX_GAP", "expects chunk 0"),
    (chunk_item("s", 0, np.zeros((3, 4), np.float32)),
     "INVALID_ARGUMENT", "BAD_TENSOR", "wanted float32 [frames, 5]"),
    (chunk_item("s", 0, np.zeros((3, 5))), "INVALID_ARGUMENT", "BAD_TENSOR", "float64 [3, 5]"),
    (chunk_item("s", 0, np.zeros(5, np.float32)), "INVALID_ARGUMENT", "BAD_TENSOR", "float32 [5]"),
    (chunk_item("s", 0, np.float32(1)), "INVALID_ARGUMENT", "BAD_TENSOR", "float32 []"),
    (chunk_item("s", 0, GOOD, name="y"), "INVALID_ARGUMENT", "BAD_TENSOR", "['x']"),
    (chunk_item("s", 0, GOOD * np.nan), "INVALID_ARGUMENT", "BAD_TENSOR", "not finite"),
    (chunk_item("s", 0, GOOD + np.inf), "INVALID_ARGUMENT", "BAD_TENSOR", "not finite"),
    (chunk_item("s", 0, GOOD[:0]), "INVALID_ARGUMENT", "BAD_TENSOR", "no frames"),
    (chunk_item("s", 0), "INVALID_ARGUMENT", "BAD_TENSOR", "['x']"),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s", tensors=[pb.Tensor(dtype=1, shape=[2, 5], data=b"123")])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "3 bytes",
    ),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s",
            tensors=[pb.Tensor(dtype=1, shape=[-2, -5], data=bytes(40))])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "[-2, -5]",
    ),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s", tensors=[pb.Tensor(dtype=77, shape=[1], data=b"1")])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "77",
    ),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s", tensors=[tensor(GOOD), tensor(GOOD, "x")])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "twice",
    ),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s", tensors=[pb.Tensor(dtype=1, shape=[2**62, 0])])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "2147483647",
    ),
    (
        pb.RequestItem(chunk=pb.Chunk(session_id="s", tensors=[pb.Tensor(dtype=1, shape=[0] * 100)])),
        "INVALID_ARGUMENT", "BAD_TENSOR", "100 axes",
    ),
    (open_item("x", "n" * 5000), "NOT_FOUND", "MODEL_NOT_FOUND", "n…"),
    (open_item("x", "tagger", policy=policy("unspecified", 7, 3)), "INVALID_ARGUMENT", "POLICY_NOT_ALLOWED", "kind"),
    (open_item("s", "speaker", resume=True), "FAILED_PRECONDITION", "SESSION_DIFFERS", "tagger"),
    (open_item("s", "", resume=True, policy=policy("full")), "FAILED_PRECONDITION", "SESSION_DIFFERS", "carry"),
    (chunk_item("s", 0, np.zeros((10_001, 5), np.float32)), "RESOURCE_EXHAUSTED", "TOO_LARGE", "10000"),
    (close_item("nobody"), "NOT_FOUND", "SESSION_NOT_FOUND", "nobody"),
    (pb.RequestItem(), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "nothing"),
]
# fmt: on


@pytest.mark.parametrize(("item", "code", "why", "said"), REFUSED)
async def test_a_bad_item_is_refused_and_the_session_goes_on(
    channel: grpc.aio.Channel, item: pb.RequestItem, code: str, why: str, said: str
):
    """Each refusal has its status and says what came and what was wanted; the session's next chunk is answered."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=policy("carry")))
        message = failed(await stream.ask(item), code, why)
        assert said in message
        assert (await stream.ask(chunk_item("s", 0, GOOD))).result.frames == 3


async def test_a_gap_tells_the_expected_index(channel: grpc.aio.Channel):
    """A client can read the index that the session expects from the error's metadata."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        item = await stream.ask(chunk_item("s", 5, GOOD))
        assert item.failed.index == 5
        (info,) = item.failed.status.details
        assert b"expected_index" in info.value


async def test_a_closed_session_says_so(channel: grpc.aio.Channel):
    """After Close, and after `end`, a further chunk is FAILED_PRECONDITION."""
    async with RawStream(channel) as stream:
        await stream.send(open_item("a", "tagger"), close_item("a"), open_item("b", "tagger"))
        for _ in range(3):
            await stream.receive()
        failed(await stream.ask(chunk_item("a", 0, GOOD)), "FAILED_PRECONDITION", "SESSION_CLOSED")
        await stream.ask(chunk_item("b", 0, GOOD, end=True))
        failed(await stream.ask(chunk_item("b", 1, GOOD)), "FAILED_PRECONDITION", "SESSION_CLOSED")


@pytest.mark.settings(idle_timeout_s=0.2)
async def test_an_idle_session_expires_and_says_so(channel: grpc.aio.Channel):
    """The stream that holds it is told, a late chunk gets SESSION_EXPIRED, and its place is free again."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        told = await stream.receive()
        assert told is not None
        failed(told, "NOT_FOUND", "SESSION_EXPIRED")
        failed(await stream.ask(chunk_item("s", 0, GOOD)), "NOT_FOUND", "SESSION_EXPIRED")
        failed(await stream.ask(open_item("s", "tagger", resume=True)), "NOT_FOUND", "SESSION_EXPIRED")
        assert (await stream.ask(open_item("s", "tagger"))).HasField("opened")


@pytest.mark.settings(max_sessions=2)
async def test_too_many_sessions(channel: grpc.aio.Channel):
    """One session over the bound is RESOURCE_EXHAUSTED with a time to retry; closing one makes room."""
    async with RawStream(channel) as stream:
        for number in range(2):
            assert (await stream.ask(open_item(f"{number}", "tagger"))).HasField("opened")
        item = await stream.ask(open_item("2", "tagger"))
        failed(item, "RESOURCE_EXHAUSTED", "TOO_MANY_SESSIONS")
        assert retry_info(item.failed.status) is not None
        await stream.ask(close_item("0"))
        assert (await stream.ask(open_item("2", "tagger"))).HasField("opened")


@pytest.mark.settings(max_pending_chunks=8)
async def test_a_full_queue(channel: grpc.aio.Channel):
    """More chunks at once than may wait: those over it are RESOURCE_EXHAUSTED, those before are answered."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=policy("carry")))
        await stream.send(*(chunk_item("s", index, GOOD) for index in range(11)))
        items = [await stream.receive() for _ in range(11)]
        refused = [item.failed for item in items if item.HasField("failed")]
        assert sorted(item.result.index for item in items if item.HasField("result")) == list(range(8))
        assert reason(refused[0].status) == "QUEUE_FULL"
        assert retry_info(refused[0].status) is not None
        assert (await stream.ask(chunk_item("s", 8, GOOD))).result.index == 8


@pytest.mark.settings(max_buffered_frames=10)
async def test_a_full_policy_session_is_bounded(channel: grpc.aio.Channel):
    """Under `full` no more frames are held than the server allows, and what is held is still answered."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=policy("full")))
        for index in range(3):
            await stream.ask(chunk_item("s", index, GOOD))
        failed(await stream.ask(chunk_item("s", 3, GOOD)), "RESOURCE_EXHAUSTED", "TOO_LARGE")
        assert (await stream.ask(chunk_item("s", 3, end=True))).result.frames == 9


@pytest.mark.settings(max_message_bytes=10_000)
async def test_a_message_over_the_limit(channel: grpc.aio.Channel):
    """A message over the limit ends the call with RESOURCE_EXHAUSTED and leaves its sessions to be resumed."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        await stream.send(chunk_item("s", 0, np.zeros((600, 5), np.float32)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.receive()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    async with RawStream(channel) as stream:
        assert (await stream.ask(open_item("s", "tagger", resume=True))).opened.next_index == 0


async def test_a_detached_session_must_be_resumed(channel: grpc.aio.Channel):
    """A chunk for a session whose stream has gone says that it has to be resumed first."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
    async with RawStream(channel) as stream:
        item = await stream.ask(chunk_item("s", 0, GOOD))
        while reason(item.failed.status) == "FENCED":  # the server has not yet seen the other stream's end
            item = await stream.ask(chunk_item("s", 0, GOOD))
        failed(item, "FAILED_PRECONDITION", "SESSION_DETACHED")


@pytest.mark.parametrize(
    ("tensors", "lengths", "said"),
    [
        ([], [], "wanted ['x']"),
        ([tensor(GOOD, "x")], [], "wanted float32 [batch, time, 5]"),
        ([tensor(np.zeros((2, 3, 5), np.float32), "x")], [3], "one length"),
        ([tensor(np.zeros((2, 3, 5), np.float32), "x")], [3, 0], "one length"),
        ([tensor(np.zeros((2, 3, 5), np.float32), "x")], [3, 4], "one length"),
        ([tensor(np.zeros((0, 3, 5), np.float32), "x")], [], "at least one row"),
        ([tensor(np.zeros((3, 0, 5), np.float32), "x")], [], "one length"),
    ],
)
async def test_infer_refuses_what_cannot_run(channel: grpc.aio.Channel, tensors, lengths, said):
    """No batch of 0, no row of length 0 and no wrong shape reaches the runtime; each says what was wanted."""
    stub = CarouselStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(pb.InferRequest(model="tagger", tensors=tensors, lengths=lengths))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()
    assert reason(rpc_status(caught.value)) == "BAD_TENSOR"


async def test_a_deadline_that_passes_before_the_step_runs(channel: grpc.aio.Channel, server: Server, monkeypatch):
    """An Infer whose deadline passes while another step runs is DEADLINE_EXCEEDED, and is never run."""
    model = server.engine.catalogue.get("tagger")
    run = model.steps._runner.run

    def slowly(step):
        time.sleep(0.5)
        return run(step)

    monkeypatch.setattr(model.steps._runner, "run", slowly)
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=policy("carry")))
        await stream.send(chunk_item("s", 0, GOOD))
        await asyncio.sleep(0.1)
        request = pb.InferRequest(model="tagger", tensors=[tensor(GOOD[None], "x")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CarouselStub(channel).Infer(request, timeout=0.1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await stream.receive()).HasField("result")
        assert (await stream.ask(chunk_item("s", 1, GOOD))).HasField("result")
    assert (model.steps.counters.steps, model.steps.counters.rows) == (2, 2)


async def test_an_unexpected_fault_tells_the_client_a_number_and_no_traceback(
    channel: grpc.aio.Channel, server: Server, monkeypatch, caplog
):
    """A bug in the server is INTERNAL with a number that the log has too, and ends no stream."""
    monkeypatch.setattr(server.engine.sessions, "use", lambda *_: 1 / 0)
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        item = await stream.ask(chunk_item("s", 0, GOOD))
        message = failed(item, "INTERNAL", "INTERNAL")
        assert "division" not in message
        number = message.split()[2].rstrip(";")
        assert number in caplog.text
        monkeypatch.undo()
        assert (await stream.ask(chunk_item("s", 0, GOOD))).HasField("result")


async def test_a_message_of_too_many_items_is_refused(channel: grpc.aio.Channel):
    """A small message that holds a hundred thousand items ends its own call, and others are served meanwhile."""
    async with RawStream(channel) as stream, RawStream(channel) as other:
        await other.ask(open_item("other", "tagger", policy=policy("carry")))
        await stream.send(*(pb.RequestItem() for _ in range(100_000)))
        assert (await other.ask(chunk_item("other", 0, GOOD))).result.frames == 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.receive()
        assert reason(rpc_status(caught.value)) == "TOO_LARGE"


async def test_a_client_that_never_reads_is_read_no_more(channel: grpc.aio.Channel, server: Server):
    """Answers to a client that does not take them are bounded; the server stops reading it instead of filling up."""
    async with RawStream(channel) as stream, RawStream(channel) as other:
        await stream.ask(open_item("s", "tagger", policy=policy("carry")))
        await stream.ask(chunk_item("s", 0, np.zeros((10_000, 5), np.float32)))
        (call,) = [call for call in server._native._calls if call._held]
        repeats = pb.StreamRequest(items=[chunk_item("s", 0, GOOD)] * 4000)
        sending = [asyncio.create_task(stream.call.write(repeats)) for _ in range(3)]
        await other.ask(open_item("other", "tagger", policy=policy("carry")))
        for index in range(20):
            assert (await other.ask(chunk_item("other", index, GOOD))).result.frames == 3
            assert call._waiting_bytes < 16 * 1024 * 1024
        assert call._waiting_bytes > 0
        for task in sending:
            task.cancel()


async def test_an_answer_over_the_message_limit_reaches_its_client(server: Server):
    """A chunk that was small enough to be taken is answered whatever the answer's size, and ends no stream."""
    options = [("grpc.max_receive_message_length", -1)]
    target = f"127.0.0.1:{server.port}"
    async with grpc.aio.insecure_channel(target, options=options) as channel, RawStream(channel) as stream:
        await stream.ask(open_item("s", "speaker"), open_item("t", "speaker"))
        await stream.receive()
        tokens = np.zeros(10_000, np.int64)
        await stream.send(*(chunk_item("s", index, tokens) for index in range(10)), chunk_item("t", 0, tokens[:5]))
        answers = [await stream.receive() for _ in range(11)]
        assert sum(answer.result.frames for answer in answers) == 100_005


@pytest.mark.parametrize("method", ["Infer", "Stream"])
async def test_what_is_no_message_is_an_invalid_argument(channel: grpc.aio.Channel, method: str):
    """Bytes that are no protobuf get INVALID_ARGUMENT in our words, from unary calls and streams alike."""
    path = f"/carousel.v1.Carousel/{method}"
    garbage = b"\xff\xff"
    unary, stream = channel.unary_unary(path), channel.stream_stream(path)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (unary(garbage) if method == "Infer" else stream(iter([garbage])).read())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "generate the client anew" in caught.value.details()


async def test_a_chunk_whose_stream_ended_before_its_step_does_not_move_the_state(
    channel: grpc.aio.Channel, server: Server, monkeypatch
):
    """A stream that ends while its chunk waits leaves the session where it was, and it says which chunk is next."""
    runner = server.engine.catalogue.get("tagger").steps._runner
    run = runner.run

    def slowly(step):
        time.sleep(0.5)
        return run(step)

    monkeypatch.setattr(runner, "run", slowly)
    async with RawStream(channel) as busy, RawStream(channel) as later:
        await busy.ask(open_item("busy", "tagger", policy=policy("carry")))
        await later.ask(open_item("late", "tagger", policy=policy("carry")))
        await busy.send(chunk_item("busy", 0, GOOD))
        await asyncio.sleep(0.1)
        await later.send(chunk_item("late", 0, GOOD))
        await asyncio.sleep(0.1)
        later.call.cancel()
        assert (await busy.receive()).HasField("result")
        await asyncio.sleep(0.2)
        assert (await busy.ask(open_item("late", "tagger", resume=True))).opened.next_index == 0
    assert server.engine.catalogue.get("tagger").steps.counters.rows == 1


@pytest.mark.settings(idle_timeout_s=0.4)
async def test_a_session_is_in_use_until_its_answer(channel: grpc.aio.Channel, server: Server, monkeypatch):
    """Idleness counts from the last answer: a step that outlasts the timeout does not expire the session after it."""
    runner = server.engine.catalogue.get("tagger").steps._runner
    run = runner.run

    def slowly(step):
        time.sleep(0.8)
        return run(step)

    monkeypatch.setattr(runner, "run", slowly)
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger", policy=policy("carry")))
        assert (await stream.ask(chunk_item("s", 0, GOOD))).HasField("result")
        monkeypatch.undo()
        await asyncio.sleep(0.15)
        assert (await stream.ask(chunk_item("s", 1, GOOD))).HasField("result")
