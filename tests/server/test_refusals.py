"""What a refused request leaves behind on the server, and what its client is told of its own words."""

import asyncio
import gc

import grpc
import pytest
from tests.support.stream import RawStream, open_item, reason, rpc_status

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_server.front.stream import StreamCall
from carousel_server.serve import Server


async def test_a_refused_request_is_gone_at_once(channel: grpc.aio.Channel):
    """No request, and no stream, waits for the garbage collector after it was refused, however large it was."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError):
                await CarouselStub(channel).PutState(pb.PutStateRequest(state=b"x"))
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.stream_stream("/carousel.v1.Carousel/Stream")(iter([b"\\xff"])).read()
        await asyncio.sleep(0.05)
        left = [type(found) for found in gc.get_objects() if type(found) in {pb.PutStateRequest, StreamCall}]
        # What the last call here was made with may still be in use.
        assert left.count(StreamCall) == 0
        assert left.count(pb.PutStateRequest) <= 1
    finally:
        gc.enable()


async def test_what_a_client_said_is_said_back_in_one_short_line(channel: grpc.aio.Channel):
    """A name with line breaks, or of a megabyte, makes a refusal of one line, whose details arrive."""
    async with RawStream(channel) as stream:
        await stream.ask(open_item("s", "tagger"))
        failed = (await stream.ask(open_item("s", "tagger", resume=True, version="1\\nTraceback"))).failed
        assert failed.status.message.isprintable()
    tensor = pb.Tensor(name="n" * 1_000_000, dtype=1, shape=[3], data=b"1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await CarouselStub(channel).Infer(pb.InferRequest(model="tagger", tensors=[tensor]))
    assert reason(rpc_status(caught.value)) == "BAD_TENSOR"


async def test_a_holder_has_a_bound(channel: grpc.aio.Channel, server: Server):
    """A client cannot have megabytes kept with a session by the name that it gives itself."""
    async with RawStream(channel) as stream:
        failed = (await stream.ask(open_item("s", "tagger", holder="h" * 129))).failed
        assert reason(failed.status) == "INVALID_ARGUMENT"
        assert len(server.engine.sessions) == 0


async def test_no_name_is_no_model(channel: grpc.aio.Channel, server: Server):
    """What names no model is refused, and above all unloads none: an empty field is not all that is served."""
    stub = CarouselStub(channel)
    for call, request in (
        (stub.UnloadModel, pb.UnloadModelRequest()),
        (stub.LoadModel, pb.LoadModelRequest()),
        (stub.GetModel, pb.GetModelRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        assert reason(rpc_status(caught.value)) == "MODEL_NOT_FOUND"
    async with RawStream(channel) as stream:
        assert reason((await stream.ask(open_item("s", ""))).failed.status) == "MODEL_NOT_FOUND"
        assert (await stream.ask(open_item("s", "tagger"))).HasField("opened")
    assert all(entry.model is not None for entry in server.engine.catalogue.entries())
