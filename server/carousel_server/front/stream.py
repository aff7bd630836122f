"""One `Stream` call: what it asks goes to the engine in order, what is ready leaves together."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from carousel_protos.v1.carousel_pb2 import (
    Chunk,
    Close,
    Failed,
    GoingAway,
    Open,
    Opened,
    RequestItem,
    ResponseItem,
    StreamRequest,
    StreamResponse,
)
from carousel_protos.v1.carousel_pb2 import Closed as ClosedMessage
from carousel_server import faults
from carousel_server.engine.asked import Asked
from carousel_server.engine.codec import decode, fill_result
from carousel_server.engine.engine import Engine
from carousel_server.engine.events import Event, Failure, Result, Taken
from carousel_server.engine.policy import Blocking
from carousel_server.engine.spec import Port
from carousel_server.errors import CarouselError, DrainingError, InvalidError, TooLargeError
from carousel_server.front.guard import caller
from carousel_server.front.interceptor import internal
from carousel_server.front.status import to_status

# Bytes of answers that wait for a slow reader, and of requests for a slow store, before no more are read, about.
_MOST_WAITING = 8 * 1024 * 1024
# Payload bytes of one response message; a single answer may be larger.
_MESSAGE_BYTES = 1024 * 1024
# Items of one request message, and how many are taken before others get their turn.
_ITEMS, _TURN = 4096, 128
# What an item without tensors counts for, and one that says with its details why something failed.
_ITEM_BYTES, _FAILED_BYTES = 256, 2048

# Requests are read as bytes: a stream parses its own.
Context = grpc.aio.ServicerContext[bytes, StreamResponse]
# A result is written into its message when that leaves.
Answer = tuple[Result, Sequence[Port]]


@dataclass(frozen=True, slots=True)
class _Held:
    """A session that the stream holds or waits for, in memory or not; so it keeps nothing of it."""

    version: str
    variant: str
    blocking: Blocking
    # Names.
    inputs: tuple[str, ...]
    outputs: Sequence[Port]


class StreamCall:
    """Reads, and beside it writes; it is the sink of the sessions that it holds."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self._engine = engine
        self._context = context
        self._owner = caller().name
        self._held: dict[str, _Held] = {}
        # What is asked of sessions that the store is asked for, in order; and who asks it.
        self._fetched: dict[str, deque[RequestItem]] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        # What waits to be written, with its size.
        self._outbox: deque[tuple[int, ResponseItem | Answer]] = deque()
        # Of both, which the budget has too for as long as the call lasts.
        self._waiting_bytes = 0
        self._budget = engine.budget
        self._over = False
        # What the writer waits on while there is nothing to write: cheaper than an Event, once for each message.
        self._filled: asyncio.Future[None] | None = None
        self._emptied = asyncio.Event()
        self._half_closed = False
        self._reader: asyncio.Task[None] | None = None
        self._handing_over = False

    async def serve(self) -> None:
        """Until the client has half-closed and has all its answers, or either side breaks off."""
        self._reader = asyncio.create_task(self._read(), name="stream reader")
        if self._handing_over:
            self._reader.cancel()
        try:
            await self._write()
            if self._handing_over:
                await self._engine.settle(self)
                raise DrainingError("this server is stopping; resume on another", retry_after_s=0.1)
            await self._reader
        finally:
            self._end()

    def _end(self) -> None:
        assert self._reader is not None, "it was started"
        for task in (self._reader, *self._fetches):
            task.cancel()
        # Its error knows this call: in a cycle both would stay, with the last message, until the collector comes.
        self._reader = None
        self._engine.detach(self)
        self._hold(-self._waiting_bytes)
        self._over = True

    def hand_over(self) -> None:
        """Read no more, answer and write down what was read, and end: its sessions can then be resumed elsewhere."""
        self._handing_over = self._half_closed = True
        if self._reader is not None:
            self._reader.cancel()
        self._wake()

    def deliver(self, event: Event) -> None:
        if isinstance(event, Result):
            size = _ITEM_BYTES
            for data in event.data:
                size += len(data) if data is not None else 0
            if (held := self._held.get(event.session_id)) is not None:
                self._send((event, held.outputs), size)
        elif isinstance(event, Taken):
            if (held := self._held.get(event.session_id)) is not None:
                self._send(ResponseItem(opened=self._opened(event, held)))
        elif isinstance(event, Failure):
            if event.index is None:  # the session is no longer this stream's
                self._held.pop(event.session_id, None)
            self._refuse(_failed(event.session_id, event.error, event.index))
        else:
            self._held.pop(event.session_id, None)
            self._send(ResponseItem(closed=ClosedMessage(session_id=event.session_id)))

    def going_away(self, deadline_unix_ms: int) -> None:
        self._send(ResponseItem(going_away=GoingAway(deadline_unix_ms=deadline_unix_ms)))

    def _send(self, item: ResponseItem | Answer, size: int = _ITEM_BYTES) -> None:
        self._outbox.append((size, item))
        self._hold(size)
        self._wake()

    def _wake(self) -> None:
        """The writer looks again."""
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    def _refuse(self, failed: Failed) -> None:
        self._send(ResponseItem(failed=failed), _FAILED_BYTES)

    def _hold(self, size: int) -> None:
        if not self._over:
            self._waiting_bytes += size
            self._budget.held += size

    async def _read(self) -> None:
        try:
            while isinstance(raw := await self._context.read(), bytes):  # or else it is EOF
                try:
                    items = StreamRequest.FromString(raw).items
                except DecodeError as error:
                    raise InvalidError("this is no carousel.v1.StreamRequest; generate the client anew") from error
                if len(items) > _ITEMS:
                    raise TooLargeError(f"a message has {len(items)} items and {_ITEMS} are allowed; send several")
                for position, item in enumerate(items):
                    self._take(item)
                    if position % _TURN == _TURN - 1:
                        await asyncio.sleep(0)
                    while self._waiting_bytes > min(_MOST_WAITING, max(0, self._budget.share)):
                        self._emptied.clear()
                        await self._emptied.wait()
        finally:
            self._half_closed = True
            self._wake()

    def _take(self, item: RequestItem) -> None:
        kind = item.WhichOneof("item")
        asked = item.chunk if kind == "chunk" else item.open if kind == "open" else item.close
        if self._fetched and asked.session_id in self._fetched:
            self._fetched[asked.session_id].append(item)
            self._hold(_size(item))
        elif kind == "open" and self._engine.cold is not None:
            self._fetch(item, asked)
        else:
            self._ask(item, kind, asked)

    def _ask(self, item: RequestItem, kind: str | None, asked: Open | Chunk | Close) -> None:
        try:
            if kind == "chunk":
                self._chunk(item.chunk)
            elif kind == "open":
                self._open(item.open)
            elif kind == "close":
                self._close(item.close)
            else:
                raise InvalidError("a request item holds nothing; put open, chunk or close into it")
        except CarouselError as error:
            if kind != "open" and self._engine.is_cold(self, asked.session_id):
                self._fetch(item, asked)
                return
            index = item.chunk.index if kind == "chunk" else None
            self._refuse(_failed(asked.session_id, error, index))
        except Exception:  # noqa: BLE001 (one item's fault never ends the stream of the others)
            index = item.chunk.index if kind == "chunk" else None
            self._refuse(Failed(session_id=asked.session_id, status=internal(), index=index))

    def _fetch(self, item: RequestItem, asked: Open | Chunk | Close) -> None:
        """The store is asked first; what else is asked of the session waits for it, in order, and nobody else does."""
        self._fetched[asked.session_id] = deque([item])
        self._hold(_size(item))
        task = asyncio.create_task(self._bring(asked.session_id, item.open if item.HasField("open") else None))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _bring(self, session_id: str, opening: Open | None) -> None:
        failed: Failed | None = None
        try:
            if opening is None:
                await self._engine.bring_held(self, session_id)
            else:
                await self._engine.bring(self._asked(opening))
        except CarouselError as error:
            failed = _failed(session_id, error, None)
        except Exception:  # noqa: BLE001 (one session's fault never ends the stream of the others)
            failed = Failed(session_id=session_id, status=internal())
        waiting = self._fetched.pop(session_id)
        self._hold(-sum(map(_size, waiting)))
        self._emptied.set()
        if failed is not None:  # and all that was asked on top of it
            self._held.pop(session_id, None)
            self._refuse(failed)
            return
        first = waiting.popleft()
        self._ask(first, first.WhichOneof("item"), opening or (first.chunk if first.HasField("chunk") else first.close))
        for item in waiting:
            self._take(item)
        self._wake()  # a stream that the client has half-closed may be over

    def _asked(self, opening: Open) -> Asked:
        return Asked(
            session_id=opening.session_id,
            owner=self._owner,
            model=opening.model,
            version=opening.version,
            policy=opening.policy if opening.HasField("policy") else None,
            resume=opening.resume,
            holder=opening.holder,
            epoch=opening.epoch if opening.HasField("epoch") else None,
        )

    def _open(self, asked: Open) -> None:
        states = decode(asked.initial_state, ())
        session, model = self._engine.open(
            self,
            session_id=asked.session_id,
            model=asked.model,
            version=asked.version,
            policy=asked.policy if asked.HasField("policy") else None,
            resume=asked.resume,
            initial_state=states,
            context=decode(asked.context, ()),
            variant=asked.variant,
            holder=asked.holder,
            epoch=asked.epoch if asked.HasField("epoch") else None,
            acknowledged=_acknowledged(asked),
            owner=self._owner,
        )
        self._held[session.id] = _Held(
            model.version, session.variant, session.blocking, model.spec.input_names, session.outputs
        )
        session.taken()

    def _opened(self, event: Taken, held: _Held) -> Opened:
        return Opened(
            session_id=event.session_id,
            epoch=event.epoch,
            next_index=event.next_index,
            policy=held.blocking.message(),
            version=held.version,
            variant=held.variant,
            window=self._engine.window,
        )

    def _chunk(self, chunk: Chunk) -> None:
        held = self._held.get(chunk.session_id)
        tensors = decode(chunk.tensors, held.inputs if held is not None else ())
        self._engine.submit(
            self,
            chunk.session_id,
            chunk.index,
            tensors,
            end=chunk.end,
            acknowledged=_acknowledged(chunk),
            owner=self._owner,
        )

    def _close(self, asked: Close) -> None:
        if self._engine.close(self, asked.session_id, acknowledged=_acknowledged(asked), owner=self._owner):
            self._held.pop(asked.session_id, None)
            self._send(ResponseItem(closed=ClosedMessage(session_id=asked.session_id)))

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._outbox:
                await self._context.write(self._response())
                faults.reach("after-answer")
                self._emptied.set()
            if self._half_closed and not self._fetched and self._engine.idle(self):
                return
            self._filled = loop.create_future()
            await self._filled

    def _response(self) -> StreamResponse:
        """What waits, or as much of it as one message takes."""
        response, size = StreamResponse(), 0
        while self._outbox and (not size or size + self._outbox[0][0] <= _MESSAGE_BYTES):
            of_item, waiting = self._outbox.popleft()
            size += of_item
            if isinstance(waiting, tuple):
                fill_result(response.items.add().result, *waiting)
            else:
                response.items.append(waiting)
        self._hold(-size)
        return response


def _size(item: RequestItem) -> int:
    return _ITEM_BYTES + item.ByteSize()


def _acknowledged(asked: Open | Chunk | Close) -> int | None:
    return asked.acknowledged if asked.HasField("acknowledged") else None


def _failed(session_id: str, error: CarouselError, index: int | None) -> Failed:
    return Failed(session_id=session_id, status=to_status(error), index=index)
