"""The blocking client's I/O: a channel, one Stream call for all sessions, and the thread that reads it.

A call that breaks is followed by another, until nothing is answered for `resume_timeout` seconds. Where the server says
that it will stop, new sessions go to a connection of their own, and those that are open stay until it ends theirs.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from carousel_client.access import Access
from carousel_client.backoff import Backoff
from carousel_client.errors import AlreadyExists, CarouselError, FailedPrecondition, Unavailable, from_rpc
from carousel_client.outbox import Outbox
from carousel_client.protocol import Member, StreamState
from carousel_client.requests import read_signature
from carousel_client.session_state import SessionState
from carousel_client.signature import Signature
from carousel_protos.v1.carousel_pb2 import Chunk, GetModelRequest, Open, Opened, Result, StreamRequest
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

# Seconds that the server is given to end the stream after this side has.
CLOSE_GRACE_S = 2.0
CHANNEL_OPTIONS = [
    # Answers may be far larger than what was sent, and an own limit checks what is sent.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A second connection to the same address is one.
    ("grpc.use_local_subchannel_pool", 1),
    # When to try again is decided here.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A network that vanished without a word is found out.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]

Response = TypeVar("Response")


@dataclass(frozen=True)
class Settings:
    """Where a client connects, and how; `connect` says what each means."""

    access: Access
    max_message_bytes: int
    resume_timeout: float

    def stream(self) -> StreamState:
        return StreamState(self.max_message_bytes, self.resume_timeout)


class _Link:
    """A connection, and the stream on it. `call` and `thread` are there once a session was opened."""

    def __init__(self, settings: Settings) -> None:
        self.channel = settings.access.channel(CHANNEL_OPTIONS)
        self.stub = CarouselStub(self.channel)
        self.stream = settings.stream()
        self.call: Any = None
        self.thread: threading.Thread | None = None


class Connection:
    """Safe to use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._signatures: dict[tuple[str, str], Signature] = {}
        # Guards the streams' state, which callers fill, grpc's writer threads drain and the reader threads answer;
        # notified when there is something to write, and when a call has ended.
        self._condition = threading.Condition()
        # The newest takes new sessions and unary calls.
        self._links = [_Link(settings)]
        self._closed = False
        # Whether a server has answered a call here: what breaks from then on is not the address's fault.
        self._connected = False

    @property
    def target(self) -> str:
        return self._settings.access.target

    @property
    def max_message_bytes(self) -> int:
        return self._settings.max_message_bytes

    @property
    def stub(self) -> CarouselStub:
        return self._links[-1].stub

    @property
    def streams(self) -> list[StreamState]:
        return [link.stream for link in self._links]

    def unary(
        self, method: Callable[..., Response], request: object, timeout: float | None, session_id: str = ""
    ) -> Response:
        """One unary call, about a session if one is named. Raises `CarouselError`."""
        if self._closed:
            raise closed_error()
        try:
            response = method(request, timeout=timeout, metadata=self._settings.access.metadata(session_id))
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, connected=self._connected) from None
        self._connected = True
        return response

    def signature(self, model: str, version: str, timeout: float | None = None) -> Signature:
        """The signature of a model's version, asked for once, and again where a server that was there is gone."""
        key = (model, version)
        backoff = Backoff(self._settings.resume_timeout if timeout is None else 0.0)
        while key not in self._signatures:
            try:
                response = self.unary(self.stub.GetModel, GetModelRequest(model=model, version=version), timeout)
                signature = read_signature(response)
            except Unavailable as error:
                delay = backoff.delay(time.monotonic(), least=error.retry_after or 0.0) if self._connected else None
                if delay is None:
                    raise
                with self._condition:
                    self._condition.wait_for(lambda: self._closed, delay)
            else:
                self._signatures[model, signature.version] = self._signatures[key] = signature
        return self._signatures[key]

    def open(self, request: Open) -> SessionState:
        session = SessionState(request, self.max_message_bytes)
        with self._condition:
            if self._closed:
                raise closed_error()
            newest = self._links[-1].stream
            self._put(Member(session, Backoff(self._settings.resume_timeout)), elsewhere=newest.served)
        return session

    def send(self, session: SessionState, chunk: Chunk, timeout: float | None) -> Future[Result]:
        """The answer to come. Waits for room. Raises `TimeoutError`. One thread at a time for each session."""
        answer: Future[Result] = Future()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._condition:
                if not session.full:
                    session.send(chunk, answer)
                    self._condition.notify_all()
                    return answer
                room: Future[None] = Future()
                session.wait_room(room)
            room.result(None if deadline is None else deadline - time.monotonic())

    def wait_opened(self, session: SessionState) -> Future[Opened]:
        answer: Future[Opened] = Future()
        with self._condition:
            session.wait_opened(answer)
        return answer

    def watch(self, session: SessionState) -> Future[Result]:
        """A future that gets the error which ends the session, and never a result."""
        watcher: Future[Result] = Future()
        with self._condition:
            session.watch(watcher)
        return watcher

    def unwatch(self, session: SessionState, watcher: Future[Result]) -> None:
        with self._condition:
            session.unwatch(watcher)

    def end(self, session: SessionState) -> Future[None]:
        answer: Future[None] = Future()
        with self._condition:
            session.close(answer)
            self._condition.notify_all()
        return answer

    def close(self) -> None:
        """Write what still waits, end the streams and the channels. Sessions that are open are left to the server."""
        with self._condition:
            self._closed = True
            for link in self._links:
                link.stream.finished = True
            self._condition.notify_all()
        for link in list(self._links):
            if link.thread is not None:
                link.thread.join(CLOSE_GRACE_S)
                link.call.cancel()
                link.thread.join()
            link.channel.close()

    def _put(self, member: Member, *, elsewhere: bool) -> None:
        """Put a session on the newest stream; where its server stops and `elsewhere`, on another connection."""
        link = self._links[-1]
        if link.stream.going_away is not None and elsewhere:
            link.stream.retired = True
            link = _Link(self._settings)
            self._links.append(link)
        begin = link.thread is None or link.stream.finished
        if link.stream.finished:
            link.stream = self._settings.stream()
        link.stream.adopt(member)
        if begin:
            link.thread = threading.Thread(
                target=self._run, args=(link, link.stream), name="carousel-reader", daemon=True
            )
            link.thread.start()
        self._condition.notify_all()

    def _move(self, members: list[Member]) -> None:
        for member in members:
            try:
                self._put(member, elsewhere=True)
            except AlreadyExists as error:
                member.session.end(error)

    def _run(self, link: _Link, stream: StreamState) -> None:
        """One call after the other, until nothing is to follow."""
        try:
            while True:
                error = self._call(link, stream)
                with self._condition:
                    delay = stream.broken(closed_error() if self._closed else error, time.monotonic())
                    self._condition.notify_all()
                    if delay is None:
                        return
                    self._condition.wait_for(lambda: self._closed, delay)
                    if self._closed:
                        return
                    if stream.retired:
                        self._move(stream.release())
                        return
                    stream.restart()
        finally:
            with self._condition:
                stream.fail(closed_error())
                if stream.retired and not self._closed:
                    self._links.remove(link)
                    link.channel.close()

    def _call(self, link: _Link, stream: StreamState) -> CarouselError:
        """One call from its beginning to its end, and what ended it."""
        with self._condition:
            metadata = self._settings.access.metadata(stream.oldest)
        link.call = link.stub.Stream(self._requests(stream, stream.outbox), metadata=metadata)
        try:
            for response in link.call:
                now = time.monotonic()
                with self._condition:
                    stream.receive(response, now)
                    if stream.over or stream.until_due(now) is not None:
                        self._condition.notify_all()
        except grpc.RpcError as failure:
            return from_rpc(failure, self.target, connected=self._connected)
        return Unavailable(f"{self.target} ended the stream; open the session again")

    def _requests(self, stream: StreamState, outbox: Outbox) -> Iterator[StreamRequest]:
        while True:
            with self._condition:
                while not (outbox or stream.over or stream.outbox is not outbox):
                    now = time.monotonic()
                    if due := stream.take_due(now):
                        self._move(due)  # which fills the outbox, mostly
                    else:
                        self._condition.wait(stream.until_due(now))
                message = outbox.take() if stream.outbox is outbox else None
            if message is None:
                return
            yield message


def closed_error() -> FailedPrecondition:
    return FailedPrecondition("this client is closed; connect again")
