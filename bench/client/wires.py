"""How a session talks to each kind of server: `send` a chunk by its index, `receive` the next answer in order."""

import asyncio
import base64
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

import grpc
from bench.client.native import Chunks, OwnStream
from bench.client.phase import Phase
from bench.workload import Workload

_INFERENCE = "bench/peers/triton/inference.proto"
_ids = count(1)


class Session(Protocol):
    """Each is one session of one server."""

    async def open(self) -> None: ...
    async def send(self, index: int) -> None: ...
    async def receive(self) -> bytes: ...
    async def close(self) -> None: ...


class PlainStream:
    """A by-hand server's gRPC stream: bytes of one chunk in, bytes of its answer out."""

    def __init__(self, channel: grpc.aio.Channel, chunks: list[bytes], number: int) -> None:
        self._stream: Any = channel.stream_stream("/byhand/Stream")()
        self._chunks, self._number = chunks, number

    async def open(self) -> None:
        await self._stream.wait_for_connection()

    async def send(self, index: int) -> None:
        await self._stream.write(self._chunks[(self._number + index) % len(self._chunks)])

    async def receive(self) -> bytes:
        answer: bytes = await self._stream.read()
        return answer

    async def close(self) -> None:
        self._stream.cancel()


class Inference:
    """The Open Inference Protocol's unary `ModelInfer` as Triton takes it; each call is a task in flight.

    The request is encoded once for each chunk of the ring, but for what tells the session. A message's fields may come
    in any order and parts, so that is written before it.
    """

    def __init__(self, channel: grpc.aio.Channel, messages: Any, requests: list[bytes], number: int) -> None:
        self._messages, self._requests, self._number = messages, requests, number
        self._call: Any = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", response_deserializer=messages.ModelInferResponse.FromString
        )
        self._id = next(_ids)
        self._on = self._session()
        self._pending: Any = None

    def _session(self, *, start: bool = False, end: bool = False) -> bytes:
        request = self._messages.ModelInferRequest()
        request.parameters["sequence_id"].int64_param = self._id
        request.parameters["sequence_start"].bool_param = start
        request.parameters["sequence_end"].bool_param = end
        return _encoded(request)

    def _ask(self, index: int, session: bytes) -> None:
        self._pending = self._call(session + self._requests[(self._number + index) % len(self._requests)])

    async def open(self) -> None:
        pass

    async def send(self, index: int) -> None:
        self._ask(index, self._on if index else self._session(start=True))

    async def receive(self) -> bytes:
        answer: bytes = (await self._pending).raw_output_contents[0]
        return answer

    async def close(self) -> None:
        self._ask(0, self._session(end=True))
        await self._pending


class SessionTensor(Inference):
    """The same as MLServer's runtime takes it: the session is the first tensor, and is never told to end."""

    def _session(self, *, start: bool = False, end: bool = False) -> bytes:  # noqa: ARG002
        return _encoded(self._messages.ModelInferRequest(raw_input_contents=[self._id.to_bytes(8, "little")]))

    async def close(self) -> None:
        pass


class Http:
    """POST on a kept-alive connection; hand-written, for that costs the client least.

    The body is a chunk's bytes, and a header has the session.
    """

    def __init__(self, target: str, path: str, chunks: list[bytes], number: int) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._path, self._chunks, self._number = path, chunks, number
        self._id = next(_ids)

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def send(self, index: int) -> None:
        chunk = self._chunks[(self._number + index) % len(self._chunks)]
        self._post("application/octet-stream", chunk)
        await self._writer.drain()

    def _post(self, kind: str, body: bytes) -> None:
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nX-Session: {self._id}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)

    async def receive(self) -> bytes:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        status, *lines = head.splitlines()
        fields = dict(line.split(": ", 1) for line in lines if line)
        if "content-length" not in fields:
            raise RuntimeError(f"the server answered without a length: {head}")
        body = await self._reader.readexactly(int(fields["content-length"]))
        if status.split()[1] != "200":
            raise RuntimeError(f"the server answered {status}: {body[:300]!r}")
        return body

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class Json(Http):
    """The same with session and frames as JSON, base64; `listed` where the server takes and answers a list of them."""

    listed = False

    async def send(self, index: int) -> None:
        frames = self._chunks[(self._number + index) % len(self._chunks)]
        body = b'{"session":%d,"frames":"%s"}' % (self._id, frames)
        self._post("application/json", b'{"chunks":[%s]}' % body if self.listed else body)
        await self._writer.drain()

    async def receive(self) -> bytes:
        return base64.b64decode((await super().receive()).rsplit(b'"', 2)[1])


class JsonList(Json):
    """As BentoML takes it."""

    listed = True


def sessions(phase: Phase, workload: Workload, channel: grpc.aio.Channel, target: str) -> list[Session]:
    """The phase's sessions, not yet opened."""
    make = _WIRES[phase.wire](phase, workload, channel, target)
    return [make(number) for number in range(phase.sessions)]


def _own(phase: Phase, workload: Workload, channel: grpc.aio.Channel, _target: str) -> Callable[[int], Session]:
    chunks = Chunks(workload)
    return lambda number: OwnStream(channel, phase, chunks, number)


def _plain(_phase: Phase, workload: Workload, channel: grpc.aio.Channel, _target: str) -> Callable[[int], Session]:
    chunks = [chunk.tobytes() for chunk in workload.chunks]
    return lambda number: PlainStream(channel, chunks, number)


def _http(phase: Phase, workload: Workload, _channel: grpc.aio.Channel, target: str) -> Callable[[int], Session]:
    kind, path = _PATHS[phase.wire]
    chunks = [chunk.tobytes() for chunk in workload.chunks]
    if issubclass(kind, Json):
        chunks = [base64.b64encode(chunk) for chunk in chunks]
    return lambda number: kind(target, path.format(model=phase.model), chunks, number)


def _inference(phase: Phase, workload: Workload, channel: grpc.aio.Channel, _target: str) -> Callable[[int], Session]:
    messages = grpc.protos(_INFERENCE)
    tensor = messages.ModelInferRequest.InferInputTensor
    told = [tensor(name="session", datatype="INT64", shape=(1, 1))] if phase.wire == "mlserver" else []
    requests = [
        _encoded(
            messages.ModelInferRequest(
                model_name=phase.model,
                inputs=[*told, tensor(name="x", datatype="FP32", shape=(1, *chunk.shape))],
                raw_input_contents=[chunk.tobytes()],
            )
        )
        for chunk in workload.chunks
    ]
    kind = SessionTensor if told else Inference
    return lambda number: kind(channel, messages, requests, number)


def _encoded(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


_Maker = Callable[[Phase, Workload, grpc.aio.Channel, str], Callable[[int], Session]]
_PATHS: dict[str, tuple[type[Http], str]] = {
    "http": (Http, "/chunk"),
    "torchserve": (Http, "/predictions/{model}"),
    "litserve": (Json, "/chunk"),
    "bentoml": (JsonList, "/chunk"),
}
_WIRES: dict[str, _Maker] = {
    "own": _own,
    "plain": _plain,
    "inference": _inference,
    "mlserver": _inference,
    **dict.fromkeys(_PATHS, _http),
}
