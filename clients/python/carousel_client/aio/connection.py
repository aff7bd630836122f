"""The asyncio client's I/O: a channel, one Stream call for all sessions, a task that writes and one that reads it."""

# ruff: noqa: ASYNC109 -- gRPC itself takes the timeout

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from carousel_client.access import Access
from carousel_client.connection import CHANNEL_OPTIONS, CLOSE_GRACE_S, closed_error
from carousel_client.errors import CarouselError, Unavailable, from_rpc
from carousel_client.protocol import SessionState, StreamState
from carousel_client.requests import read_signature
from carousel_client.signature import Signature
from carousel_protos.v1.carousel_pb2 import Chunk, GetModelRequest, Open, Opened, Result
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

Response = TypeVar("Response")


class Connection:
    """Made inside the event loop that uses it."""

    def __init__(self, access: Access, max_message_bytes: int) -> None:
        self.target = access.target
        self.max_message_bytes = max_message_bytes
        self._channel = access.aio_channel(CHANNEL_OPTIONS)
        self._metadata = access.metadata
        self.stub = CarouselStub(self._channel)
        self._signatures: dict[tuple[str, str], Signature] = {}
        self._stream: StreamState | None = None
        self._call: Any = None
        # Set when there is something to write, or the end to announce.
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        # Whether a server has answered a call here: what breaks from then on is not the address's fault.
        self._connected = False

    @property
    def stream(self) -> StreamState | None:
        return self._stream

    async def unary(
        self, method: Callable[..., Awaitable[Response]], request: object, timeout: float | None
    ) -> Response:
        """One unary call. Raises `CarouselError`."""
        if self._closed:
            raise closed_error()
        try:
            response = await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.target, connected=self._connected) from None
        self._connected = True
        return response

    async def signature(self, model: str, version: str, timeout: float | None = None) -> Signature:
        """The signature of a model's version, asked for once."""
        key = (model, version)
        if key not in self._signatures:
            response = await self.unary(self.stub.GetModel, GetModelRequest(model=model, version=version), timeout)
            signature = self._signatures[key] = read_signature(response)
            self._signatures[model, signature.version] = signature
        return self._signatures[key]

    def open(self, request: Open) -> SessionState:
        if self._closed:
            raise closed_error()
        if self._stream is None or self._stream.finished:
            self._start()
        assert self._stream is not None, "it was just started"
        session = self._stream.open(request)
        self._ready.set()
        return session

    def send(self, session: SessionState, chunk: Chunk) -> asyncio.Future[Result]:
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        session.send(chunk, answer)
        self._ready.set()
        return answer

    def wait_opened(self, session: SessionState) -> asyncio.Future[Opened]:
        answer: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        session.wait_opened(answer)
        return answer

    def watch(self, session: SessionState) -> asyncio.Future[Result]:
        """A future that gets the error which ends the session, and never a result."""
        watcher: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        session.watch(watcher)
        return watcher

    def end(self, session: SessionState) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session.close(answer)
        self._ready.set()
        return answer

    async def close(self) -> None:
        """Write what still waits, end the stream and the channel. Sessions that are open are left to the server."""
        self._closed = True
        if self._stream is not None:
            self._stream.finished = True
            self._ready.set()
            await asyncio.wait(self._tasks, timeout=CLOSE_GRACE_S)
            self._call.cancel()
            await asyncio.wait(self._tasks)
        await self._channel.close()

    def _start(self) -> None:
        stream = self._stream = StreamState(self.max_message_bytes)
        self._ready = asyncio.Event()
        self._call = self.stub.Stream(metadata=self._metadata)
        self._tasks = [
            asyncio.create_task(self._write(stream, self._call, self._ready), name="carousel-writer"),
            asyncio.create_task(self._read(stream, self._call, self._ready), name="carousel-reader"),
        ]

    async def _write(self, stream: StreamState, call: Any, ready: asyncio.Event) -> None:
        try:
            while not stream.finished or stream.outbox:
                await ready.wait()
                ready.clear()
                while (message := stream.outbox.take()) is not None:
                    await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended, and the reader learns why

    async def _read(self, stream: StreamState, call: Any, ready: asyncio.Event) -> None:
        error: CarouselError = Unavailable(f"{self.target} ended the stream; open the session again")
        try:
            async for response in call:
                stream.receive(response)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc(failure, self.target, connected=self._connected)
        finally:
            stream.fail(closed_error() if self._closed else error)
            ready.set()
