"""One session's bookkeeping, across the streams that it is on one after the other. No I/O, no clock, no lock.

Both clients drive it and put their own futures in as waiters. What was not acknowledged is kept and sent again on the
next stream, from the oldest chunk on: the server answers what it has run from memory and runs the rest.
"""

import copy
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from carousel_client.errors import CarouselError, FailedPrecondition, NotFound, SessionNotFound
from carousel_client.outbox import Outbox, measure
from carousel_protos.v1.carousel_pb2 import Chunk, Close, Open, Opened, Result

# Chunks that may be sent before the server has said how many (carousel.v1.Opened.window).
LEAST_WINDOW = 8
# Bytes of chunks that a session keeps unacknowledged before it takes no more.
MAX_BYTES = 16 * 1024 * 1024

T_contra = TypeVar("T_contra", contravariant=True)


class Waiter(Protocol[T_contra]):
    """What a `concurrent.futures.Future` and an `asyncio.Future` have in common."""

    def done(self) -> bool: ...
    def set_result(self, result: T_contra, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


def new_session_id() -> str:
    return uuid.uuid4().hex


@dataclass(eq=False)
class Sent:
    """A chunk that was sent, or is to be, and has no answer yet."""

    chunk: Chunk
    size: int
    waiter: Waiter[Result]
    # An earlier chunk failed while this one was under way: it will be refused for the gap.
    void: bool = False


class SessionState:
    """The error that ended it, if one did, is raised by whatever is asked next."""

    def __init__(self, request: Open, max_message_bytes: int) -> None:
        """Raises `ResourceExhausted` for a request over the limit."""
        measure(request, max_message_bytes)
        self.id = request.session_id
        self.opened: Opened | None = None
        # In the order in which they were sent; their indices may repeat after a chunk that failed.
        self.unacknowledged: deque[Sent] = deque()
        self._limit = max_message_bytes
        # The first chunk that is this client's.
        self.first_index = 0
        # What opens it: as long as no result has arrived the whole of what was asked, since it can be opened anew.
        self._request = request
        # Results of all chunks before this index have arrived.
        self._acknowledged = 0
        self._next_index = 0
        self._bytes = 0
        # Where a session stands that somebody else began is known once it is opened.
        self._window = 0 if request.resume else LEAST_WINDOW
        # That of the stream that it is on.
        self._outbox: Outbox | None = None
        # Whether that stream has said Opened: what it says before is not about what was sent on it.
        self._heard = False
        self._open_waiters: list[Waiter[Opened]] = []
        self._room_waiters: list[Waiter[None]] = []
        self._watchers: list[Waiter[Result]] = []
        self._close_waiter: Waiter[None] | None = None
        self._error: CarouselError | None = None
        self._error_was_told = False

    # The stream it is on

    def attach(self, outbox: Outbox) -> None:
        """Open it on a stream, for the first time or again; `send_again` goes with it."""
        self._outbox, self._heard = outbox, False
        request = self._request
        if self.opened is not None:
            request.epoch = self.opened.epoch
            request.acknowledged = self._acknowledged
        outbox.put(request)

    def send_again(self) -> None:
        """Send what was not acknowledged, and Close if it was asked."""
        assert self._outbox is not None, "it was attached"
        kept = [sent for sent in self.unacknowledged if not sent.void]
        dropped = [sent for sent in self.unacknowledged if sent.void]
        self.unacknowledged = deque(kept)
        for sent in kept:
            sent.chunk.acknowledged = self._acknowledged
            self._outbox.put(sent.chunk)
        if self._close_waiter is not None:
            self._put_close()
        for sent in dropped:
            self._bytes -= sent.size
            error = FailedPrecondition(
                f"chunk {sent.chunk.index} of session {self.id} was dropped with a failed one before it; send it again"
            )
            _refuse(sent.waiter, error)
        self._make_room()

    def detach(self) -> None:
        """The stream has broken: what is sent from now on waits for the next one."""
        self._outbox, self._heard = None, False

    # What is asked

    @property
    def full(self) -> bool:
        """No chunk may be sent before an answer has come."""
        return len(self.unacknowledged) >= self._window or self._bytes >= MAX_BYTES

    def wait_room(self, waiter: Waiter[None]) -> None:
        self._raise_if_ended()
        if self.full:
            self._room_waiters.append(waiter)
        else:
            waiter.set_result(None)

    def send(self, chunk: Chunk, waiter: Waiter[Result]) -> None:
        """Number `chunk` and send it; its waiter gets the result."""
        self._raise_if_ended()
        if self._close_waiter is not None:
            raise FailedPrecondition(f"session {self.id} is closed; open another one")
        chunk.session_id, chunk.index, chunk.acknowledged = self.id, self._next_index, self._acknowledged
        size = measure(chunk, self._limit)
        self._next_index += 1
        self._bytes += size
        self.unacknowledged.append(Sent(chunk, size, waiter))
        if self._outbox is not None:
            self._outbox.put(chunk)

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
        if self._outbox is not None:
            self._put_close()

    # What is answered

    def on_opened(self, opened: Opened) -> bool:
        """False where the server has an older state than this session needs, which ends it."""
        if self.opened is None and self._request.resume:
            self.first_index = self._next_index = self._acknowledged = opened.next_index
        self.opened, self._heard = opened, True
        self._window = opened.window or LEAST_WINDOW
        if opened.next_index < self._acknowledged:
            self.end(
                FailedPrecondition(
                    f"session {self.id} is at chunk {opened.next_index} on the server, which had answered all before "
                    f"{self._acknowledged}: its state was lost; open a new session, or serve with --durability step"
                )
            )
            return False
        for waiter in self._open_waiters:
            if not waiter.done():
                waiter.set_result(opened)
        self._open_waiters.clear()
        self._make_room()
        return True

    def on_result(self, result: Result) -> None:
        if not self._heard or (sent := self._answered(result.index)) is None:
            return
        if not self._acknowledged and not self._request.resume:
            # From now on it cannot begin anew.
            self._request = Open(
                session_id=self.id, model=self._request.model, holder=self._request.holder, resume=True
            )
        self._acknowledged = result.index + 1
        if not sent.waiter.done():
            sent.waiter.set_result(result)
        self._make_room()

    def on_chunk_failed(self, index: int, error: CarouselError) -> None:
        """The state has not moved: the next chunk takes the index of this one, and those under way go with it."""
        if not self._heard or (sent := self._answered(index)) is None:
            return
        if not sent.void:
            self._next_index = index
            for later in self.unacknowledged:
                later.void = True
        _refuse(sent.waiter, error)
        self._make_room()

    def on_closed(self) -> None:
        self._end(FailedPrecondition(f"session {self.id} was closed before this was answered"), closed=True)

    def end(self, error: CarouselError) -> None:
        """It goes on no more."""
        gone = isinstance(error, NotFound) or error.reason == "SESSION_CLOSED"
        if self.opened is not None and isinstance(error, SessionNotFound):
            where = f"session {self.id}, answered up to chunk {self._acknowledged}, is not on this server any more"
            error.args = (
                f"{where}: a restart keeps those of `carousel serve --store sqlite:FILE`; open a new session",
            )
        # A session that is gone is as closed as Close wants it.
        self._end(error, closed=gone and self._close_waiter is not None and self.opened is not None)

    def _put_close(self) -> None:
        assert self._outbox is not None, "it is asked where there is a stream"
        self._outbox.put(Close(session_id=self.id, acknowledged=self._acknowledged))

    def _answered(self, index: int) -> Sent | None:
        # The oldest of its index: a chunk may take the index of one that failed while later ones were under way.
        for sent in self.unacknowledged:
            if sent.chunk.index == index:
                self.unacknowledged.remove(sent)
                self._bytes -= sent.size
                return sent
        return None

    def _make_room(self) -> None:
        if self._room_waiters and not self.full:
            for waiter in self._room_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._room_waiters.clear()

    def _end(self, error: CarouselError, *, closed: bool) -> None:
        self._error = error
        waiters: list[Waiter[Any]] = [
            *(sent.waiter for sent in self.unacknowledged),
            *self._open_waiters,
            *self._room_waiters,
            *self._watchers,
        ]
        if self._close_waiter is not None:
            if closed and not self._close_waiter.done():
                self._close_waiter.set_result(None)
            waiters.append(self._close_waiter)
        for waiter in waiters:
            self._error_was_told |= _refuse(waiter, error)
        self._error_was_told |= closed
        self.unacknowledged.clear()
        self._open_waiters.clear()
        self._room_waiters.clear()
        self._watchers.clear()
        self.detach()

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            self._error_was_told = True
            raise copy.copy(self._error)


def _refuse(waiter: Waiter[Any], error: CarouselError) -> bool:
    """Whether somebody was told."""
    if waiter.done():
        return False
    waiter.set_exception(copy.copy(error))
    return True
