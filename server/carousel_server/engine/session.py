"""A session: puts chunks in order, answers a repeated one from memory, cuts blocks, and gathers each chunk's answer.

It is pure: no clock, no I/O, no model. A chunk counts as done when it is answered; until then its frames stay, and the
state before it can be put back, so a failure moves nothing. An answer stays until its client has acknowledged it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from carousel_server.config import Limits
from carousel_server.engine.budget import Budget
from carousel_server.engine.context import NO_CONTEXT, Context
from carousel_server.engine.events import Closed, Event, Failure, Result, Sink, Taken
from carousel_server.engine.frames import Frames, Piece
from carousel_server.engine.place import Place
from carousel_server.engine.policy import CAUSAL, FULL, Blocking
from carousel_server.engine.spec import Array, Port
from carousel_server.errors import (
    CarouselError,
    IndexGapError,
    QueueFullError,
    SessionClosedError,
    TooLargeError,
    TooShortError,
)


class Outlet(Protocol):
    """What stands between a session and its sink, where its moves are written before they are told."""

    def changed(self, session: "Session") -> None: ...
    def deliver(self, session: "Session", event: Event) -> None: ...


@dataclass(slots=True)
class _Pending:
    index: int
    frames: int
    # Frames received, and frames final, once this chunk counts.
    received: int
    final: int
    end: bool
    # The outputs of its blocks so far, one tuple a block.
    blocks: list[tuple[bytes, ...]] = field(default_factory=list)


class Session:
    """One stream of frames through one model, and its place in it. Counts are frames unless they say otherwise."""

    # So its fields take 280 bytes; in a dict they take 1,600.
    __slots__ = (
        "_acknowledged",
        "_answered",
        "_asked",
        "_closing",
        "_ended",
        "_frames",
        "_has_values",
        "_kept",
        "_least_frames",
        "_limits",
        "_next_index",
        "_pending",
        "_received",
        "_run",
        "_value",
        "blocking",
        "closed",
        "context",
        "epoch",
        "graph",
        "holder",
        "id",
        "known_epoch",
        "leaving",
        "outlet",
        "outputs",
        "owner",
        "queued",
        "rollback",
        "sink",
        "slot",
        "stored",
        "variant",
    )

    def __init__(
        self,
        session_id: str,
        outputs: Sequence[Port],
        blocking: Blocking,
        *,
        graph: str,
        slot: int,
        limits: Limits,
        budget: Budget,
        frame_bytes: int = 0,
        context: Context = NO_CONTEXT,
        variant: str = "float32",
        owner: str = "",
        least_frames: int = 1,
    ) -> None:
        """`frame_bytes` are what a frame that waits, and its answer, count for in the budget."""
        self.id = session_id
        # Who opened it, and may use it; "" on a server without authentication.
        self.owner = owner
        self.outputs = outputs
        self.blocking = blocking
        self.context = context
        self.graph = graph
        self.variant = variant
        self.slot = slot
        self.epoch = 1
        self.sink: Sink | None = None
        self.outlet: Outlet | None = None
        # Whether the store has it as it is.
        self.stored = False
        # The newest epoch in the store that is of this server's making, or from before it: one after that is another's.
        self.known_epoch = 0
        # In the scheduler's queue or in a step; the model sets it.
        self.queued = False
        self.closed = False
        # Another version takes it over at its next chunk: until then no chunk is begun.
        self.leaving = False
        # The state rows before the first block of the oldest pending chunk, kept once that chunk needs a second block.
        self.rollback: list[Array] | None = None
        self._limits = limits
        self._least_frames = least_frames
        self._closing = False
        self._frames = Frames(budget, frame_bytes)
        # Lists, here and in the frames: a deque has 760 bytes also where it is empty, as in every idle session.
        self._pending: list[_Pending] = []
        self._next_index = 0
        self._received = 0
        self._answered = 0  # frames whose answer was given; the frames kept start here
        self._run = 0
        self._ended = False
        # Whoever opened it or took it up last, by a name of its own choice; "" is nobody twice.
        self.holder = ""
        # The newest answers, in order, which may be asked for again; just the last one where none is acknowledged.
        self._kept: list[Result] = []
        self._acknowledged: int | None = None
        # Chunks before this index were sent on the stream that holds it now: others' answers are not for it yet.
        self._asked = 0
        # Of outputs with one value a sequence.
        self._has_values = not all(port.per_frame for port in outputs)
        self._value: tuple[bytes | None, ...] = (None,) * len(outputs)

    @property
    def next_index(self) -> int:
        return self._next_index

    @property
    def idle(self) -> bool:
        """Nothing waits for an answer."""
        return not self._pending

    @property
    def due(self) -> bool:
        """A block can be run."""
        return (
            not self.closed
            and bool(self._pending)
            and self._run < self._pending[0].final
            and (not self.leaving or bool(self._pending[0].blocks))
        )

    @property
    def between_chunks(self) -> bool:
        """No step has or needs it: all that it was sent is answered, or not begun."""
        return not self.queued and not (self._pending and self._pending[0].blocks)

    @property
    def kept(self) -> Sequence[Result]:
        """The answers that may be asked for again."""
        return self._kept

    def resume(self, holder: str) -> None:
        """Another stream has it from now on; it gets the answers to what is sent on it, again or for the first time."""
        self.epoch += 1
        self.holder = holder
        self._asked = 0
        self._changed()

    def taken(self) -> None:
        """Tell the stream that has it now."""
        self._deliver(Taken(self.id, self.epoch, self._next_index))

    def acknowledge(self, index: int | None) -> None:
        """The answers to all chunks before `index` have arrived; None: the client has not said."""
        if index is not None:
            self._acknowledged = max(index, self._acknowledged or 0)
            while self._kept and self._kept[0].index < index:
                del self._kept[0]

    def accept(
        self, index: int, tensors: tuple[Array, ...], frames: int, *, end: bool, acknowledged: int | None = None
    ) -> None:
        """Take the next chunk, or answer one again whose answer is kept.

        Raises `IndexGapError`, `SessionClosedError`, `QueueFullError`, `TooLargeError`, `TooShortError`; then nothing
        was taken.
        """
        self.acknowledge(acknowledged)
        if index != self._next_index:
            self._repeat(index)
            return
        if self._closing or self._ended:
            raise SessionClosedError(f"session {self.id} has ended; open a new one", expected_index=self._next_index)
        unacknowledged = len(self._pending) + (len(self._kept) if self._acknowledged is not None else 0)
        if unacknowledged >= self._limits.max_pending_chunks:
            raise QueueFullError(
                f"session {self.id} has {unacknowledged} chunks waiting or not acknowledged; send on after an answer",
                retry_after_s=0.05,
                expected_index=self._next_index,
            )
        if (held := len(self._frames) + frames) > self._limits.max_buffered_frames:
            raise TooLargeError(
                f"session {self.id} would hold {held} frames and {self._limits.max_buffered_frames} are allowed; "
                "send on after an answer, or end the sequence earlier"
            )
        if (size := self._frames.measure(frames)) > self._frames.budget.share and frames:
            self._refuse_size(size)
        if end and 0 < self._received + frames < self._least_frames:
            raise TooShortError(
                f"chunk {index} ends session {self.id} after {self._received + frames} frames, and the model needs at "
                f"least {self._least_frames}; send as many before the end",
                expected_index=self._next_index,
                least_frames=self._least_frames,
            )
        self._frames.push(tensors, frames)
        self._received += frames
        self._next_index += 1
        self._asked = self._next_index
        self._ended = end
        final = self.blocking.final(self._received, ended=end)
        self._pending.append(_Pending(index, frames, self._received, final, end))
        self._answer()

    def _refuse_size(self, size: int) -> None:
        what = f"the frames that wait for session {self.id}, with their answers, would be {size} bytes and "
        if size > self._frames.budget.most:
            raise TooLargeError(f"{what}{self._frames.budget.most} are allowed; send shorter chunks")
        raise QueueFullError(
            f"{what}{max(0, self._frames.budget.share)} are free for it; send on after an answer, or a little later",
            retry_after_s=0.1,
            expected_index=self._next_index,
        )

    def _repeat(self, index: int) -> None:
        oldest_waiting = self._next_index - len(self._pending)
        if not oldest_waiting - len(self._kept) <= index < self._next_index:
            raise IndexGapError(
                f"session {self.id} expects chunk {self._next_index} and got {index}; send from {self._next_index}",
                expected_index=self._next_index,
            )
        self._asked = max(self._asked, index + 1)
        if index < oldest_waiting:  # or else its answer is on the way
            self._deliver(self._kept[index - oldest_waiting])

    def next_block(self) -> tuple[int, int]:
        """Frames and ahead frames of the block that is due."""
        chunk = self._pending[0]
        if self.blocking.block or self.blocking.kind == FULL:
            return self.blocking.cut(self._received - self._run)
        waiting = chunk.received - self._run
        return (min(waiting, self._limits.max_block_frames) if self.blocking.kind == CAUSAL else waiting), 0

    def pieces(self, start: int, count: int) -> list[Piece]:
        """Where the inputs of frames [start, start + count) after those that were run lie."""
        return self._frames.pieces(self._run - self._answered + start, count)

    def completes(self, frames: int) -> bool:
        """Whether a block of `frames` is the last one that the oldest pending chunk needs."""
        return self._run + frames >= self._pending[0].final

    def commit(self, frames: int, outputs: tuple[bytes, ...]) -> None:
        """Take a block's outputs, `[frames, …]` or `[…]` each, once its state is in place; answer what is settled."""
        self._run += frames
        self._pending[0].blocks.append(outputs)
        self._answer()

    @property
    def place(self) -> Place:
        """Where it is without the chunks that wait; its state there is `rollback`, or else its row in the arena."""
        waiting = self._received - self._answered
        if not self._pending:
            next_index, ended = self._next_index, self._ended
        else:
            next_index, ended = self._pending[0].index, False
            waiting = self._pending[0].received - self._pending[0].frames - self._answered
        return Place(
            next_index,
            self._answered,
            ended,
            self._frames.pieces(0, waiting),
            tuple(self._kept),
            self._value,
            self._acknowledged,
            self.epoch,
            self.holder,
        )

    def take_place(self, place: Place) -> None:
        """Go on, in a new session, from where another one is or was."""
        for arrays, start, stop in place.waiting:
            self._frames.push(tuple(array[start:stop] for array in arrays), stop - start)
        self._next_index = place.next_index
        self._answered = self._run = place.answered
        self._received = place.answered + len(self._frames)
        self._ended = place.ended
        self._kept = [replace(result, session_id=self.id) for result in place.results]
        self._value = place.values
        self._acknowledged = place.acknowledged
        self.epoch = place.epoch
        self.holder = place.holder

    def move(self, graph: str, slot: int, outputs: Sequence[Port], least_frames: int) -> None:
        """Go on, between two chunks, with another version of its model."""
        self.graph, self.slot, self.outputs, self._least_frames = graph, slot, outputs, least_frames
        self.leaving = False

    def close(self) -> None:
        """Close once everything that waits is answered; at once if nothing does."""
        self._closing = True
        self._settle()

    def drop(self) -> None:
        """Close at once; what waits is forgotten."""
        self.closed = True
        self._pending.clear()
        self.sink = None

    def let_go(self) -> None:
        """It is closed, and no step holds it: nothing of it waits any more."""
        self._frames.clear()

    def _settle(self) -> None:
        if self._closing and not self._pending and not self.closed:
            self.closed = True
            self._changed()
            self._deliver(Closed(self.id))

    def withdraw(self, *, running: bool) -> None:
        """Forget the chunks of which no block was begun, as if they had never come; `running`: one is in a step now."""
        begun = running or (bool(self._pending) and bool(self._pending[0].blocks))
        forgotten = list(self._pending)[begun:]
        self._forget(forgotten)
        if forgotten:
            self._closing = False  # which was to come after them
        self._settle()

    def fail(self, error: CarouselError) -> None:
        """Refuse the oldest pending chunk, and those after it, as if they had never come."""
        refused = list(self._pending)
        self._run = self._answered
        self._forget(refused)
        asked = [chunk for chunk in refused if chunk.index < self._asked]
        if asked:
            self._deliver(Failure(self.id, error, refused[0].index))
        for chunk in asked[1:]:
            gap = IndexGapError(
                f"chunk {chunk.index} of session {self.id} was dropped with chunk {refused[0].index}; "
                f"send from {refused[0].index}",
                expected_index=refused[0].index,
            )
            self._deliver(Failure(self.id, gap, chunk.index))
        self._settle()

    def _forget(self, newest: list[_Pending]) -> None:
        """Take back the newest pending chunks, which are these."""
        if not newest:
            return
        frames = sum(chunk.frames for chunk in newest)
        for _ in newest:
            self._pending.pop()
        self._frames.drop_last(frames)
        self._received -= frames
        self._next_index = newest[0].index
        self._ended = False

    def _answer(self) -> None:
        while self._pending and self._run >= self._pending[0].final:
            chunk = self._pending.pop(0)
            frames = self._run - self._answered
            self._frames.drop_first(frames)
            data = chunk.blocks[0] if len(chunk.blocks) == 1 else self._join(chunk.blocks)
            result = Result(self.id, chunk.index, self._answered, frames, data)
            if self._acknowledged is None:
                self._kept.clear()
            self._kept.append(result)
            self._answered = self._run
            if self._has_values:
                self._value = data
            self.rollback = None
            self._changed()
            if chunk.index < self._asked:
                self._deliver(result)
        self._settle()

    def _join(self, blocks: list[tuple[bytes, ...]]) -> tuple[bytes | None, ...]:
        """The outputs of a chunk that took no block, or several."""
        return tuple(
            b"".join(block[position] for block in blocks)
            if port.per_frame
            else (blocks[-1] if blocks else self._value)[position]
            for position, port in enumerate(self.outputs)
        )

    def _changed(self) -> None:
        if self.outlet is not None:
            self.outlet.changed(self)

    def _deliver(self, event: Event) -> None:
        if self.outlet is not None:
            self.outlet.deliver(self, event)
        elif self.sink is not None:
            self.sink.deliver(event)
