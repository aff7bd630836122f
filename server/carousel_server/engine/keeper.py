"""The keeper: what a session answered is in the store before its client is told.

Sessions that moved are written together, all that moved while the last commit was under way. It is told of each move
(`changed`) and of each event (`deliver`), and hands an event on when no move before it is unwritten.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from carousel_server import faults
from carousel_server.engine.events import Event, Sink
from carousel_server.engine.model import Model
from carousel_server.engine.session import Session
from carousel_server.errors import CarouselError, FencedError, StoreError
from carousel_server.store.store import Record, Store

log = logging.getLogger("carousel")

# Sessions of one commit.
_BATCH = 256
# Seconds between two attempts at a commit that failed: doubled each time, up to the second.
_RETRY_S, _RETRY_MOST_S = 0.05, 1.0
# Seconds for which a store remembers a session after it expired or was closed.
TOMBSTONE_S = 3600.0


@dataclass(slots=True, eq=False)
class _Entry:
    """A session that moved, and what its clients are told once that is written."""

    session: Session
    model: Model
    # The stream that is told; that of a session that closed, from before it closed.
    sink: Sink | None
    events: list[tuple[Sink, Event]] = field(default_factory=list)
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    # Taken when the session was closed, since its state row is then given to others.
    tombstone: Record | None = None


class Keeper:
    """`each_step`: every move is written before it is told; or else only what `save` asks for.

    A commit that the store does not take within `patience_s` loses its sessions here: `on_lost` is told, and what the
    store has is the truth. Use within one event loop.
    """

    def __init__(
        self,
        store: Store,
        *,
        each_step: bool,
        lifetime_s: float,
        patience_s: float,
        on_lost: Callable[[Session, Sink | None, CarouselError], None],
    ) -> None:
        self.store = store
        self._each_step = each_step
        self._lifetime_s = lifetime_s
        self._patience_s = patience_s
        self._on_lost = on_lost
        self._models: dict[Session, Model] = {}
        self._moved: dict[Session, _Entry] = {}
        self._writing: dict[Session, _Entry] = {}
        # A claim is under way for these: what they write has to wait for its epoch.
        self._paused: set[Session] = set()
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._turn_forever(), name="commits")

    async def stop(self) -> None:
        """Write what has moved, and let go of the store."""
        if self._task is not None:
            while self._moved or self._writing:
                self._paused.clear()
                self._ready.set()
                await asyncio.sleep(0.005)
            self._task.cancel()
        await self.store.close()

    def enter(self, session: Session, model: Model) -> None:
        """A session is in memory from now on, and tells of itself here."""
        self._models[session] = model
        session.outlet = self

    def leave(self, session: Session) -> None:
        """A session is in memory no more; what it was yet to be told is."""
        self._models.pop(session, None)

    def changed(self, session: Session) -> None:
        session.stored = False
        if self._each_step:
            self.save(session)

    def save(self, session: Session, *, gone: str = "") -> None:
        """Write the session as it is; with `gone` as one that is no more, for that reason."""
        if (entry := self._moved.get(session)) is None:
            entry = self._moved[session] = _Entry(session, self._models[session], session.sink)
        entry.sink = session.sink
        if gone or session.closed:
            entry.tombstone = self._record(entry, gone or "closed")
        self._ready.set()

    def deliver(self, session: Session, event: Event) -> None:
        if session.sink is None:
            return
        if (entry := self._moved.get(session) or self._writing.get(session)) is None:
            session.sink.deliver(event)
        else:
            entry.events.append((session.sink, event))

    def owes(self, sink: Sink) -> bool:
        """Whether something is not told to this stream yet."""
        entries = (*self._moved.values(), *self._writing.values())
        return any(told is sink for entry in entries for told, _ in entry.events)

    async def settled(self, session: Session) -> None:
        """Come back when nothing of the session is unwritten. Raises what lost it."""
        while (entry := self._moved.get(session) or self._writing.get(session)) is not None:
            waiter = asyncio.get_running_loop().create_future()
            entry.waiters.append(waiter)
            await waiter

    @contextmanager
    def paused(self, session: Session) -> Iterator[None]:
        """Write nothing of the session meanwhile."""
        self._paused.add(session)
        try:
            yield
        finally:
            self._paused.discard(session)
            self._ready.set()

    async def _turn_forever(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            while entries := self._next():
                self._writing = {entry.session: entry for entry in entries}
                await self._write(entries)
                self._writing = {}

    def _next(self) -> list[_Entry]:
        """What is written together: one entry of an id, which a closed session may share with the next of that name."""
        chosen: dict[str, _Entry] = {}
        for session, entry in self._moved.items():
            if len(chosen) == _BATCH:
                break
            if session not in self._paused:
                chosen.setdefault(session.id, entry)
        for entry in chosen.values():
            del self._moved[entry.session]
        return list(chosen.values())

    async def _write(self, entries: list[_Entry]) -> None:
        records = [entry.tombstone or self._record(entry) for entry in entries]
        for entry in entries:
            entry.session.stored = True  # unless it moves again meanwhile
        deadline, delay = time.monotonic() + self._patience_s, _RETRY_S
        while True:
            try:
                refused = await self.store.commit(records)
                break
            except StoreError as error:
                if time.monotonic() + delay > deadline:
                    log.error("%d sessions leave memory, since they cannot be written: %s", len(entries), error)
                    for entry in entries:
                        self._lose(entry, error)
                    return
                log.warning("%s; trying again", error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MOST_S)
        faults.reach("after-commit")
        for entry in entries:
            if entry.session.id in refused:
                name = entry.session.id
                self._lose(
                    entry, FencedError(f"another server has taken session {name} over; resume it to take it back")
                )
            else:
                self._tell(entry)

    def _tell(self, entry: _Entry) -> None:
        there = entry.sink if entry.session.closed else entry.session.sink
        # What came after a later move waits for that one.
        later = self._moved.get(entry.session)
        for sink, event in entry.events:
            if sink is there:
                sink.deliver(event)
        for waiter in entry.waiters:
            if not waiter.done():
                waiter.set_result(None)
        if later is None and entry.session.closed:
            self.leave(entry.session)

    def _lose(self, entry: _Entry, error: CarouselError) -> None:
        later = self._moved.pop(entry.session, None)
        self.leave(entry.session)
        sink = entry.sink if entry.session.closed else entry.session.sink
        for waiter in (*entry.waiters, *(later.waiters if later is not None else ())):
            if not waiter.done():
                waiter.set_exception(error)
        self._on_lost(entry.session, sink, error)

    def _record(self, entry: _Entry, gone: str = "") -> Record:
        session, model = entry.session, entry.model
        return Record(
            session.id,
            session.epoch,
            session.owner,
            model.name,
            model.version,
            # A closed session's answers may still be asked for.
            model.snapshot(session) if not gone or (gone == "closed" and session.kept) else b"",
            gone,
            time.time() + self._lifetime_s + TOMBSTONE_S,
        )


def has_expired(record: Record) -> bool:
    """Whether a record is only remembered: its session was idle for its lifetime."""
    return not record.gone and time.time() > record.expires_at - TOMBSTONE_S
