"""A raw `Stream` call for tests: items in, items out, no client library between."""

import asyncio
from typing import Any

import grpc
import numpy as np
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub
from carousel_protos.v1.manifest_pb2 import DataType, Policy, PolicyKind


def tensor(array: Any, name: str = "") -> pb.Tensor:
    array = np.asarray(array)
    return pb.Tensor(
        name=name,
        dtype=DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}"),
        shape=array.shape,
        data=array.tobytes(),
    )


def array(message: pb.Tensor) -> np.ndarray:
    dtype = DataType.Name(message.dtype).removeprefix("DATA_TYPE_").lower()
    return np.frombuffer(message.data, dtype).reshape(tuple(message.shape))


def policy(kind: str, block: int = 0, ahead: int = 0) -> Policy:
    return Policy(kind=PolicyKind.Value(f"POLICY_KIND_{kind.upper()}"), block=block, ahead=ahead)


def open_item(session_id: str, model: str, **fields: Any) -> pb.RequestItem:
    return pb.RequestItem(open=pb.Open(session_id=session_id, model=model, **fields))


def chunk_item(session_id: str, index: int, frames: Any = None, *, end: bool = False, name: str = "") -> pb.RequestItem:
    tensors = [] if frames is None else [tensor(frames, name)]
    return pb.RequestItem(chunk=pb.Chunk(session_id=session_id, index=index, tensors=tensors, end=end))


def close_item(session_id: str) -> pb.RequestItem:
    return pb.RequestItem(close=pb.Close(session_id=session_id))


class RawStream:
    """`send` items in one message; `receive` the next item; use as an async context manager."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = CarouselStub(channel).Stream()
        self._items: list[pb.ResponseItem] = []

    async def __aenter__(self) -> "RawStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def send(self, *items: pb.RequestItem) -> None:
        await self.call.write(pb.StreamRequest(items=items))

    async def receive(self) -> pb.ResponseItem | None:
        """The next item, None at the stream's end."""
        while not self._items:
            response = await asyncio.wait_for(self.call.read(), 20)
            if response is grpc.aio.EOF:
                return None
            self._items.extend(response.items)
        return self._items.pop(0)

    async def ask(self, *items: pb.RequestItem) -> pb.ResponseItem:
        """Send, and take the next item for the answer."""
        await self.send(*items)
        answer = await self.receive()
        assert answer is not None
        return answer


def reason(status: Status) -> str:
    return detail(status, ErrorInfo).reason


def detail(status: Status, kind: type[Any]) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


def retry_info(status: Status) -> RetryInfo | None:
    return detail(status, RetryInfo)


def rpc_status(error: grpc.aio.AioRpcError) -> Status:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return Status.FromString(value)
    raise AssertionError(f"no details in {error}")
