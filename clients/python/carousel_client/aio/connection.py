"""The asyncio client's I/O: a channel, one Stream call for all sessions, a task that reads it and one that writes.

What follows a call that breaks, or a server that says it will stop, is as in the blocking client.
"""

# ruff: noqa: ASYNC109 -- gRPC itself takes the timeout

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from carousel_client.backoff import Backoff
from carousel_client.connection import CHANNEL_OPTIONS, CLOSE_GRACE_S, Settings, closed_error
from carousel_client.errors import AlreadyExists, CarouselError, Unavailable, from_rpc
from carousel_client.outbox import Outbox
from carousel_client.protocol import Member, StreamState
from carousel_client.requests import read_signature
from carousel_client.session_state import SessionState
from carousel_client.signature import Signature
from carousel_protos.v1.carousel_pb2 import Chunk, GetModelRequest, Open, Opened, Result
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

if TYPE_CHECKING:  # the generated class is there for type checkers alone
    from carousel_protos.v1.carousel_pb2_grpc import CarouselAsyncStub

Response = TypeVar("Response")


class _Link:
    """A connection, and the stream on it. `call` and `task` are there once a session was opened."""

    def __init__(self, settings: Settings) -> None:
        self.channel = settings.access.aio_channel(CHANNEL_OPTIONS)
        self.stub = CarouselStub(self.channel)
        self.stream = settings.stream()
        self.call: Any = None
        self.task: asyncio.Task[None] | None = None
        # Set when there may be something to write, or the end to announce.
        self.ready = asyncio.Event()


class Connection:
    """Made inside the event loop that uses it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._signatures: dict[tuple[str, str], Signature] = {}
        # The newest takes new sessions and unary calls.
        self._links = [_Link(settings)]
        self._closed = asyncio.Event()
        # Whether a server has answered a call here: what breaks from then on is not the address's fault.
        self._connected = False

    @property
    def target(self) -> str:
        return self._settings.access.target

    @property
    def max_message_bytes(self) -> int:
        return self._settings.max_message_bytes

    @property
    def stub(self) -> "CarouselAsyncStub":
        return self._links[-1].stub

    @property
    def streams(self) -> list[StreamState]:
        return [link.stream for link in self._links]

    async def unary(
        self, method: Callable[..., Awaitable[Response]], request: object, timeout: float | None, session_id: str = ""
    ) -> Response:
        """One unary call, about a session if one is named. Raises `CarouselError`."""
        if self._closed.is_set():
            raise closed_error()
        try:
            response = await method(request, timeout=timeout, metadata=self._settings.access.metadata(session_id))
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.target, connected=self._connected) from None
        self._connected = True
        return response

    async def signature(self, model: str, version: str, timeout: float | None = None) -> Signature:
        """The signature of a model's version, asked for once, and again where a server that was there is gone."""
        key = (model, version)
        backoff = Backoff(self._settings.resume_timeout if timeout is None else 0.0)
        while key not in self._signatures:
            try:
                response = await self.unary(self.stub.GetModel, GetModelRequest(model=model, version=version), timeout)
                signature = read_signature(response)
            except Unavailable as error:
                delay = backoff.delay(time.monotonic(), least=error.retry_after or 0.0) if self._connected else None
                if delay is None:
                    raise
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), delay)
            else:
                self._signatures[model, signature.version] = self._signatures[key] = signature
        return self._signatures[key]

    def open(self, request: Open) -> SessionState:
        session = SessionState(request, self.max_message_bytes)
        if self._closed.is_set():
            raise closed_error()
        newest = self._links[-1].stream
        self._put(Member(session, Backoff(self._settings.resume_timeout)), elsewhere=newest.served)
        return session

    async def send(self, session: SessionState, chunk: Chunk) -> asyncio.Future[Result]:
        """The answer to come. Waits for room. One task at a time for each session."""
        loop = asyncio.get_running_loop()
        while session.full:
            room: asyncio.Future[None] = loop.create_future()
            session.wait_room(room)
            await room
        answer: asyncio.Future[Result] = loop.create_future()
        session.send(chunk, answer)
        self._wake()
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
        self._wake()
        return answer

    async def close(self) -> None:
        """Write what still waits, end the streams and the channels. Sessions that are open are left to the server."""
        self._closed.set()
        for link in self._links:
            link.stream.finished = True
        self._wake()
        for link in list(self._links):
            if link.task is not None:
                await asyncio.wait([link.task], timeout=CLOSE_GRACE_S)
                link.call.cancel()
                await asyncio.wait([link.task])
            await link.channel.close()

    def _wake(self) -> None:
        for link in self._links:
            link.ready.set()

    def _put(self, member: Member, *, elsewhere: bool) -> None:
        """Put a session on the newest stream; where its server stops and `elsewhere`, on another connection."""
        link = self._links[-1]
        if link.stream.going_away is not None and elsewhere:
            link.stream.retired = True
            link = _Link(self._settings)
            self._links.append(link)
        begin = link.task is None or link.stream.finished
        if link.stream.finished:
            link.stream = self._settings.stream()
        link.stream.adopt(member)
        if begin:
            link.task = asyncio.create_task(self._run(link, link.stream), name="carousel-reader")
        self._wake()

    def _move(self, members: list[Member]) -> None:
        for member in members:
            try:
                self._put(member, elsewhere=True)
            except AlreadyExists as error:
                member.session.end(error)

    async def _run(self, link: _Link, stream: StreamState) -> None:
        """One call after the other, until nothing is to follow."""
        try:
            while True:
                error = await self._call(link, stream)
                delay = stream.broken(closed_error() if self._closed.is_set() else error, time.monotonic())
                if delay is None:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), delay)
                if self._closed.is_set():
                    return
                if stream.retired:
                    self._move(stream.release())
                    return
                stream.restart()
        finally:
            stream.fail(closed_error())
            if stream.retired and not self._closed.is_set():
                self._links.remove(link)
                await link.channel.close()

    async def _call(self, link: _Link, stream: StreamState) -> CarouselError:
        """One call from its beginning to its end, and what ended it."""
        call = link.call = link.stub.Stream(metadata=self._settings.access.metadata(stream.oldest))
        writer = asyncio.create_task(self._write(link, stream, stream.outbox, call), name="carousel-writer")
        try:
            async for response in call:
                now = time.monotonic()
                stream.receive(response, now)
                if stream.over or stream.until_due(now) is not None:
                    link.ready.set()
        except grpc.aio.AioRpcError as failure:
            return from_rpc(failure, self.target, connected=self._connected)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            return Unavailable(f"{self.target} ended the stream; open the session again")
        finally:
            writer.cancel()
            await asyncio.wait([writer])
        return Unavailable(f"{self.target} ended the stream; open the session again")

    async def _write(self, link: _Link, stream: StreamState, outbox: Outbox, call: Any) -> None:
        try:
            while True:
                while (message := outbox.take()) is not None:
                    await call.write(message)
                if stream.over:
                    break
                link.ready.clear()
                now = time.monotonic()
                self._move(stream.take_due(now))
                if not outbox:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(link.ready.wait(), stream.until_due(now))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended, and the reader learns why
