"""The blocking client's I/O: a channel, one Stream call for all sessions, and the thread that reads it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc

from carousel_client.access import Access
from carousel_client.errors import CarouselError, FailedPrecondition, Unavailable, from_rpc
from carousel_client.protocol import SessionState, StreamState
from carousel_client.requests import read_signature
from carousel_client.signature import Signature
from carousel_protos.v1.carousel_pb2 import Chunk, GetModelRequest, Open, Opened, Result, StreamRequest
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub

# Seconds that the server is given to end the stream after this side has.
CLOSE_GRACE_S = 2.0
# Answers may be far larger than what was sent, and an own limit checks what is sent.
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

Response = TypeVar("Response")


class Connection:
    """Safe to use from many threads."""

    def __init__(self, access: Access, max_message_bytes: int) -> None:
        self.target = access.target
        self.max_message_bytes = max_message_bytes
        self._channel = access.channel(CHANNEL_OPTIONS)
        self._metadata = access.metadata
        self.stub = CarouselStub(self._channel)
        self._signatures: dict[tuple[str, str], Signature] = {}
        # Guards the stream's state, which callers fill, grpc's writer thread drains and the reader thread answers;
        # notified when there is something to write.
        self._condition = threading.Condition()
        self._stream: StreamState | None = None
        self._call: Any = None
        self._reader: threading.Thread | None = None
        self._closed = False
        # Whether a server has answered a call here: what breaks from then on is not the address's fault.
        self._connected = False

    @property
    def stream(self) -> StreamState | None:
        return self._stream

    def unary(self, method: Callable[..., Response], request: object, timeout: float | None) -> Response:
        """One unary call. Raises `CarouselError`."""
        if self._closed:
            raise closed_error()
        try:
            response = method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, connected=self._connected) from None
        self._connected = True
        return response

    def signature(self, model: str, version: str, timeout: float | None = None) -> Signature:
        """The signature of a model's version, asked for once."""
        key = (model, version)
        if key not in self._signatures:
            response = self.unary(self.stub.GetModel, GetModelRequest(model=model, version=version), timeout)
            signature = self._signatures[key] = read_signature(response)
            self._signatures[model, signature.version] = signature
        return self._signatures[key]

    def open(self, request: Open) -> SessionState:
        with self._condition:
            if self._closed:
                raise closed_error()
            if self._stream is None or self._stream.finished:
                self._start()
            assert self._stream is not None, "it was just started"
            session = self._stream.open(request)
            self._condition.notify_all()
        return session

    def send(self, session: SessionState, chunk: Chunk) -> Future[Result]:
        answer: Future[Result] = Future()
        with self._condition:
            session.send(chunk, answer)
            self._condition.notify_all()
        return answer

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
        """Write what still waits, end the stream and the channel. Sessions that are open are left to the server."""
        with self._condition:
            self._closed = True
            if self._stream is not None:
                self._stream.finished = True
            self._condition.notify_all()
        if self._reader is not None:
            self._reader.join(CLOSE_GRACE_S)
            self._call.cancel()
            self._reader.join()
        self._channel.close()

    def _start(self) -> None:
        stream = self._stream = StreamState(self.max_message_bytes)
        self._call = self.stub.Stream(self._requests(stream), metadata=self._metadata)
        self._reader = threading.Thread(
            target=self._read, args=(stream, self._call), name="carousel-reader", daemon=True
        )
        self._reader.start()

    def _requests(self, stream: StreamState) -> Iterator[StreamRequest]:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: stream.outbox or stream.finished)
                message = stream.outbox.take()
            if message is None:
                return
            yield message

    def _read(self, stream: StreamState, call: Any) -> None:
        error: CarouselError = Unavailable(f"{self.target} ended the stream; open the session again")
        try:
            for response in call:
                with self._condition:
                    stream.receive(response)
        except grpc.RpcError as failure:
            error = from_rpc(failure, self.target, connected=self._connected)
        finally:
            with self._condition:
                stream.fail(closed_error() if self._closed else error)
                self._condition.notify_all()


def closed_error() -> FailedPrecondition:
    return FailedPrecondition("this client is closed; connect again")
