"""The protocol of one Stream call: sessions, what is to be written, who waits for what. No I/O, no clock, no lock.

Both clients drive it: they hand it what they read, write what it gives them, and put their own futures in as waiters.
"""

import copy
import uuid
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from carousel_client.errors import (
    AlreadyExists,
    CarouselError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    from_status,
)
from carousel_protos.v1.carousel_pb2 import Chunk, Close, Failed, Open, Opened, Result, StreamRequest, StreamResponse

# Bytes that wrapping a message as an item of a request can add.
_ITEM_OVERHEAD = 16

T_contra = TypeVar("T_contra", contravariant=True)


class Waiter(Protocol[T_contra]):
    """What a `concurrent.futures.Future` and an `asyncio.Future` have in common."""

    def done(self) -> bool: ...
    def set_result(self, result: T_contra, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


def new_session_id() -> str:
    return uuid.uuid4().hex


class Outbox:
    """Messages to be written, in order, coalesced up to a size."""

    def __init__(self, max_message_bytes: int) -> None:
        self._limit = max_message_bytes
        self._waiting: deque[tuple[Open | Chunk | Close, int]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Open | Chunk | Close) -> None:
        """Raises `ResourceExhausted` for a message that is over the limit by itself."""
        size = message.ByteSize() + _ITEM_OVERHEAD
        if size > self._limit:
            raise ResourceExhausted(
                f"a message of {size} bytes is over max_message_bytes ({self._limit}); send shorter chunks, "
                "or raise it here and on the server"
            )
        self._waiting.append((message, size))

    def take(self) -> StreamRequest | None:
        """Everything that waits and fits into one message; None where nothing waits."""
        if not self._waiting:
            return None
        request, room = StreamRequest(), self._limit
        while self._waiting and self._waiting[0][1] <= room:
            message, size = self._waiting.popleft()
            room -= size
            item = request.items.add()
            match message:
                case Chunk():
                    item.chunk.CopyFrom(message)
                case Open():
                    item.open.CopyFrom(message)
                case Close():
                    item.close.CopyFrom(message)
        return request


@dataclass(eq=False)
class Sent:
    """A chunk that was sent and not acknowledged."""

    chunk: Chunk
    waiter: Waiter[Result]
    # An earlier chunk failed while this one was under way: it will be refused for the gap.
    void: bool = False


class SessionState:
    """One session's bookkeeping. The error that ended it, if one did, is raised by whatever is asked next."""

    def __init__(self, request: Open, outbox: Outbox) -> None:
        self.id = request.session_id
        self.opened: Opened | None = None
        # In the order in which they were sent; their indices may repeat after a chunk that failed.
        self.unacknowledged: deque[Sent] = deque()
        self._outbox = outbox
        self._next_index = 0
        self._open_waiters: list[Waiter[Opened]] = []
        self._watchers: list[Waiter[Result]] = []
        self._close_waiter: Waiter[None] | None = None
        self._error: CarouselError | None = None
        self._error_was_told = False
        outbox.put(request)

    def send(self, chunk: Chunk, waiter: Waiter[Result]) -> None:
        """Number `chunk` and send it; its waiter gets the result."""
        self._raise_if_ended()
        if self._close_waiter is not None:
            raise FailedPrecondition(f"session {self.id} is closed; open another one")
        chunk.session_id, chunk.index = self.id, self._next_index
        self._outbox.put(chunk)
        self._next_index += 1
        self.unacknowledged.append(Sent(chunk, waiter))

    def wait_opened(self, waiter: Waiter[Opened]) -> None:
        if self.opened is not None:
            waiter.set_result(self.opened)
            return
        self._raise_if_ended()
        self._open_waiters.append(waiter)

    def watch(self, watcher: Waiter[Result]) -> None:
        """Give `watcher` the error that ends the session, when one does: for who waits with nothing under way."""
        self._raise_if_ended()
        self._watchers.append(watcher)

    def unwatch(self, watcher: Waiter[Result]) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def close(self, waiter: Waiter[None]) -> None:
        """Send Close. A session that an error has ended is closed; its waiter gets the error if nobody else has."""
        if self._error is not None:
            if self._error_was_told:
                waiter.set_result(None)
            else:
                waiter.set_exception(copy.copy(self._error))
            return
        self._close_waiter = waiter
        self._outbox.put(Close(session_id=self.id))

    def on_opened(self, opened: Opened) -> None:
        self.opened = opened
        for waiter in self._open_waiters:
            if not waiter.done():
                waiter.set_result(opened)
        self._open_waiters.clear()

    def on_result(self, result: Result) -> None:
        if (sent := self._acknowledge(result.index)) is not None and not sent.waiter.done():
            sent.waiter.set_result(result)

    def on_chunk_failed(self, index: int, error: CarouselError) -> None:
        """The state has not moved: the next chunk takes the index of this one, and those under way go with it."""
        if (sent := self._acknowledge(index)) is None:
            return
        if not sent.void:
            self._next_index = index
            for later in self.unacknowledged:
                later.void = True
        if not sent.waiter.done():
            sent.waiter.set_exception(error)

    def on_closed(self) -> None:
        self._end(FailedPrecondition(f"session {self.id} was closed before this was answered"), closed=True)

    def on_failed(self, error: CarouselError) -> None:
        # A session that is gone is as closed as Close wants it.
        self._end(
            error, closed=isinstance(error, NotFound) and self._close_waiter is not None and self.opened is not None
        )

    def _acknowledge(self, index: int) -> Sent | None:
        # The oldest of its index: a chunk may take the index of one that failed while later ones were under way.
        for sent in self.unacknowledged:
            if sent.chunk.index == index:
                self.unacknowledged.remove(sent)
                return sent
        return None

    def _end(self, error: CarouselError, *, closed: bool) -> None:
        self._error = error
        waiters: list[Waiter[Result] | Waiter[Opened] | Waiter[None]] = [
            *(sent.waiter for sent in self.unacknowledged),
            *self._open_waiters,
            *self._watchers,
        ]
        if self._close_waiter is not None:
            if closed and not self._close_waiter.done():
                self._close_waiter.set_result(None)
            waiters.append(self._close_waiter)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(copy.copy(error))
                self._error_was_told = True
        self._error_was_told |= closed
        self.unacknowledged.clear()
        self._open_waiters.clear()
        self._watchers.clear()

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            self._error_was_told = True
            raise copy.copy(self._error)


class StreamState:
    """Every session of one Stream call."""

    def __init__(self, max_message_bytes: int) -> None:
        self.outbox = Outbox(max_message_bytes)
        # When the server has said that it will stop.
        self.going_away: datetime | None = None
        # No session comes here any more: the call has ended, or is about to.
        self.finished = False
        self._sessions: dict[str, SessionState] = {}

    def open(self, request: Open) -> SessionState:
        """Send `request`, whose session id is set. Raises `AlreadyExists` for one that is open on this call."""
        if request.session_id in self._sessions:
            raise AlreadyExists(f"session {request.session_id} is open in this client; close it first")
        session = self._sessions[request.session_id] = SessionState(request, self.outbox)
        return session

    def receive(self, response: StreamResponse) -> None:
        for item in response.items:
            match item.WhichOneof("item"):
                case "result":
                    # A session that is not there has ended on this side, and nobody waits for its answers.
                    if session := self._sessions.get(item.result.session_id):
                        session.on_result(item.result)
                case "opened":
                    if session := self._sessions.get(item.opened.session_id):
                        session.on_opened(item.opened)
                case "closed":
                    if session := self._sessions.pop(item.closed.session_id, None):
                        session.on_closed()
                case "failed":
                    self._receive_failed(item.failed)
                case "going_away":
                    self.going_away = datetime.fromtimestamp(item.going_away.deadline_unix_ms / 1000, UTC)

    def fail(self, error: CarouselError) -> None:
        """The call has ended: so have its sessions."""
        self.finished = True
        if self.going_away is not None:
            error.args = (
                f"{error} (the server had announced that it stops by {self.going_away:%Y-%m-%d %H:%M:%S} UTC)",
            )
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.on_failed(error)

    def _receive_failed(self, failed: Failed) -> None:
        session = self._sessions.get(failed.session_id)
        if session is None:
            return
        if failed.HasField("index"):
            session.on_chunk_failed(failed.index, from_status(failed.status))
        else:
            del self._sessions[failed.session_id]
            session.on_failed(from_status(failed.status))
