"""Carousel's own wire. What is the same in each chunk is encoded once: client and server share the machine's cores."""

from collections.abc import Iterator, Sequence
from itertools import count
from time import perf_counter
from typing import Any

import grpc
from bench.client.phase import Phase
from bench.client.record import Record
from bench.workload import Workload

from carousel_protos.v1 import carousel_pb2 as pb
from carousel_protos.v1.manifest_pb2 import DATA_TYPE_FLOAT32, Policy, PolicyKind

_METHOD = "/carousel.v1.Carousel/Stream"
# Of one message, whose limits in the server are 4 MiB and 4,096 items.
_MESSAGE_BYTES = 1024 * 1024
_ITEMS = 1024
_ids = count()


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _parts(every: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (every[i : i + _ITEMS] for i in range(0, len(every), _ITEMS))


class Chunks:
    """The ring of chunks as encoded `Chunk.tensors` fields."""

    def __init__(self, workload: Workload) -> None:
        self._tensors = [
            _field(3, pb.Tensor(dtype=DATA_TYPE_FLOAT32, shape=chunk.shape, data=chunk.tobytes()).SerializeToString())
            for chunk in workload.chunks
        ]

    def item(self, name: bytes, session: int, index: int, acknowledged: int) -> bytes:
        """An encoded `StreamRequest.items` field; `name` is the encoded `Chunk.session_id`."""
        tensors = self._tensors[(session + index) % len(self._tensors)]
        chunk = b"".join((name, b"\x10", _varint(index), tensors, b"\x28", _varint(acknowledged)))
        return _field(1, _field(2, chunk))


def _open(name: str, phase: Phase) -> bytes:
    kind = PolicyKind.Value(f"POLICY_KIND_{phase.policy.upper()}")
    opening = pb.Open(session_id=name, model=phase.model, variant=phase.variant, policy=Policy(kind=kind))
    return pb.StreamRequest(items=[pb.RequestItem(open=opening)]).SerializeToString()


def _close(name: str) -> bytes:
    return pb.StreamRequest(items=[pb.RequestItem(close=pb.Close(session_id=name))]).SerializeToString()


def _result(item: pb.ResponseItem) -> pb.Result:
    if not item.HasField("result"):
        raise RuntimeError(f"the server answered {item}")
    return item.result


class OwnStream:
    """A session on a stream of its own."""

    def __init__(self, channel: grpc.aio.Channel, phase: Phase, chunks: Chunks, number: int) -> None:
        self._stream: Any = channel.stream_stream(_METHOD, response_deserializer=pb.StreamResponse.FromString)()
        self._name = f"own-{next(_ids)}"
        self._encoded = _field(1, self._name.encode())
        self._phase, self._chunks, self._number = phase, chunks, number
        self._answers: list[pb.ResponseItem] = []
        self._received = 0

    async def open(self) -> None:
        await self._stream.write(_open(self._name, self._phase))
        await self._stream.read()

    async def send(self, index: int) -> None:
        await self._stream.write(self._chunks.item(self._encoded, self._number, index, self._received))

    async def receive(self) -> bytes:
        if not self._answers:
            self._answers = list(reversed((await self._stream.read()).items))
        tensors = _result(self._answers.pop()).tensors
        self._received += 1
        return tensors[0].data if tensors else b""

    async def close(self) -> None:
        await self._stream.write(_close(self._name))
        await self._stream.done_writing()
        while await self._stream.read() is not grpc.aio.EOF:
            pass


class SharedStream:
    """Many sessions on one stream."""

    def __init__(self, channel: grpc.aio.Channel, phase: Phase, chunks: Chunks, sessions: int) -> None:
        self._stream: Any = channel.stream_stream(_METHOD, response_deserializer=pb.StreamResponse.FromString)()
        self._names = [f"shared-{next(_ids)}" for _ in range(sessions)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._encoded = [_field(1, name.encode()) for name in self._names]
        self._phase, self._chunks = phase, chunks

    async def open(self) -> None:
        for names in _parts(self._names):
            await self._write([_open(name, self._phase) for name in names])
            await self._drop(len(names))

    async def begin(self) -> float:
        """Send the first chunk of each; when that was."""
        sent = perf_counter()
        await self._write([self._chunks.item(name, n, 0, 0) for n, name in enumerate(self._encoded)])
        return sent

    async def used_once(self) -> None:
        """One chunk of each, answered; no more at once than the server keeps for a slow reader."""
        for numbers in _parts(range(len(self._names))):
            await self._write([self._chunks.item(self._encoded[number], number, 0, 0) for number in numbers])
            await self._drop(len(numbers))

    async def closed_loop(self, record: Record) -> None:
        """What was answered together is sent on together."""
        sent = [await self.begin()] * len(self._names)
        waiting = len(self._names)
        while waiting:
            onward = []
            for item in (await self._stream.read()).items:
                result = _result(item)
                number, index = self._numbers[result.session_id], result.index
                record.done(number, index, sent[number], result.tensors[0].data if result.tensors else b"")
                sent[number] = perf_counter()
                onward.append(self._chunks.item(self._encoded[number], number, index + 1, index + 1))
            if record.over:
                waiting -= len(onward)
            else:
                await self._write(onward)

    async def close(self) -> None:
        for names in _parts(self._names):
            await self._write([_close(name) for name in names])
            await self._drop(len(names))
        await self._stream.done_writing()
        while await self._stream.read() is not grpc.aio.EOF:
            pass

    async def _write(self, items: list[bytes]) -> None:
        """Encoded items side by side are an encoded message."""
        message: list[bytes] = []
        size = 0
        for item in items:
            if message and (size + len(item) > _MESSAGE_BYTES or len(message) == _ITEMS):
                await self._stream.write(b"".join(message))
                message, size = [], 0
            message.append(item)
            size += len(item)
        await self._stream.write(b"".join(message))

    async def _drop(self, answers: int) -> None:
        while answers > 0:
            items = (await self._stream.read()).items
            for item in items:
                if item.HasField("failed"):
                    raise RuntimeError(f"the server answered {item}")
            answers -= len(items)
