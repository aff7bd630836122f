"""The keeper: what a session answered is in the store before its client is told.

Sessions that moved are written together, all that moved while the last commit was under way. It is told of each move
(`changed`) and of each event (`deliver`), and hands an event on when no move before it is unwritten.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace

from carousel_server import faults
from carousel_server.engine.events import Event, Sink
from carousel_server.engine.model import Model
from carousel_server.engine.session import Session
from carousel_server.errors import CarouselError, FencedError, StepError, StoreError
from carousel_server.store.store import Record, Store

log = logging.getLogger("carousel")

# Sessions of one commit.
_BATCH = 256
# Seconds between two attempts at a commit that failed: doubled each time, up to the second.
_RETRY_S, _RETRY_MOST_S = 0.05, 1.0
# Seconds that a store has to let go of its file or its connections.
_CLOSE_S = 1.0
# Seconds for which a store remembers a session after it expired or was closed.
TOMBSTONE_S = 3600.0


@dataclass(slots=True, eq=False)
class _Entry:
    """A session that moved, and what its clients are told once that is written."""

    session: Session
    model: Model
    # When it moved, of those moves that are not written the first, in seconds of the monotonic clock.
    since: float
    events: list[tuple[Sink, Event]] = field(default_factory=list)
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    # Taken when the session ended, since its state row is then given to others; and the stream that had it until then.
    tombstone: Record | None = None
    sink: Sink | None = None

    @property
    def told(self) -> Sink | None:
        """The stream that is told what came of it."""
        return self.sink if self.session.closed else self.session.sink


class Keeper:
    """`each_step`: every move is written before it is told; or else only what `save` asks for, and what ends.

    A commit that the store does not take within `patience_s` loses its sessions here: `on_lost` is told, and what the
    store has is the truth. Without `each_step` they stay, since memory is the truth. Use within one event loop.
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
        # Of the sessions in memory that have not ended.
        self._models: dict[Session, Model] = {}
        self._moved: dict[Session, _Entry] = {}
        self._writing: dict[Session, _Entry] = {}
        # How many sessions were lost, since the store did not take them.
        self.lost = 0
        # Sessions whose end is not written yet.
        self._ending: dict[str, _Entry] = {}
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._turn_forever(), name="commits")

    @property
    def unwritten(self) -> Set[Session]:
        """Sessions that are not written yet."""
        return self._moved.keys() | self._writing.keys()

    async def stop(self, deadline: float) -> None:
        """Write what has moved, up to a time on the monotonic clock, and let go of the store."""
        if self._task is not None:
            # Polled: it happens once in a process's life.
            while self.unwritten and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            self._task.cancel()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.store.close()
        except (StoreError, TimeoutError):
            log.warning("the store %s did not let go within %g s", self.store.name, _CLOSE_S)

    def enter(self, session: Session, model: Model) -> None:
        """A session is in memory from now on, or on another model, and tells of itself here."""
        self._models[session] = model
        if (entry := self._moved.get(session)) is not None:
            entry.model = model
        session.outlet = self

    def leave(self, session: Session) -> None:
        """A session is in memory no more, and what is not written of it is not to be."""
        self._models.pop(session, None)
        if (entry := self._moved.pop(session, None)) is not None:
            _refuse(entry, FencedError(f"session {session.id} is another server's now"))

    def holds(self, session: Session) -> bool:
        """Whether something of the session is unwritten, and so untold."""
        return session in self._moved or session in self._writing

    def changed(self, session: Session) -> None:
        session.stored = False
        if session not in self._models:
            return  # it has ended, and only its last answers are taken up once more
        if session.closed:
            self.end(session, "closed")
        elif self._each_step:
            self.save(session)

    def save(self, session: Session) -> None:
        """Write the session as it is."""
        if session not in self._moved:
            self._moved[session] = _Entry(session, self._models[session], time.monotonic())
        self._ready.set()

    def save_unstored(self, sessions: Sequence[Session]) -> None:
        """Write those of these that the store has not as they are."""
        for session in sessions:
            if not session.stored and session in self._models:
                self.save(session)

    def end(self, session: Session, gone: str) -> None:
        """The session is no more, for that reason, which is written where the store knows of it."""
        if self._each_step or session.known_epoch or self.holds(session):
            self.save(session)
            entry = self._ending[session.id] = self._moved[session]
            entry.tombstone = self._record(entry, gone)
            for each in (entry, self._writing.get(session)):
                if each is not None:
                    each.sink = session.sink
        del self._models[session]

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
            await _written(entry)

    async def ended(self, session_id: str) -> bool:
        """Come back when no session of that name is about to end; whether one was. Raises what prevented it."""
        if (entry := self._ending.get(session_id)) is None:
            return False
        await _written(entry)
        return True

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
        for entry in self._moved.values():
            if len(chosen) == _BATCH:
                break
            chosen.setdefault(entry.session.id, entry)
        for entry in chosen.values():
            del self._moved[entry.session]
        return list(chosen.values())

    async def _write(self, entries: list[_Entry]) -> None:
        records = self._records(entries)
        for entry in records:
            entry.session.stored = True  # unless it moves again meanwhile
        delay = _RETRY_S
        while records:
            try:
                refused = await self.store.commit(list(records.values()))
                break
            except StoreError as error:
                log.warning("%s; %d sessions wait to be written", error, len(records) + len(self._moved))
                records = self._patient(records, time.monotonic() + delay, error)
            except Exception:
                # A fault of ours, which must not stop the writing for everybody.
                log.exception("a commit failed")
                for entry in records:
                    self._lose(entry, StoreError("the session could not be written; resume it"))
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MOST_S)
        faults.reach("after-commit")
        for entry, record in records.items():
            name = entry.session.id
            if name in refused:
                self._lose(
                    entry, FencedError(f"another server has taken session {name} over; resume it to take it back")
                )
            else:
                entry.session.known_epoch = record.epoch
                self._tell(entry)

    def _records(self, entries: list[_Entry]) -> dict[_Entry, Record]:
        """What is to be written; a session that cannot be is lost, and stops no other."""
        records: dict[_Entry, Record] = {}
        for entry in entries:
            try:
                records[entry] = entry.tombstone or self._record(entry)
            except Exception as error:
                log.exception("session %s cannot be written", entry.session.id)
                self._lose(entry, StepError(f"session {entry.session.id} failed ({type(error).__name__})"))
        return records

    def _patient(self, records: dict[_Entry, Record], now: float, error: StoreError) -> dict[_Entry, Record]:
        """Those that may be tried again; the others, also of those whose turn has not come, are given up."""
        overdue = [entry for entry in (*records, *self._moved.values()) if now > entry.since + self._patience_s]
        if overdue:
            log.error("%d sessions could not be written: %s", len(overdue), error)
        for entry in overdue:
            if entry not in records and self._moved.pop(entry.session, None) is None:
                continue  # lost with what was to be written before it
            if self._each_step:
                self.lost += 1
                self._lose(entry, error)
            else:
                entry.session.stored = False
                _refuse(entry, error)
                self._tell(entry)
        return {entry: record for entry, record in records.items() if entry not in overdue}

    def _tell(self, entry: _Entry) -> None:
        self._over(entry)
        for sink, event in entry.events:
            if sink is entry.told:
                sink.deliver(event)
        for waiter in entry.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _lose(self, entry: _Entry, error: CarouselError) -> None:
        self._over(entry)
        told = entry.told
        self._models.pop(entry.session, None)
        later = self._moved.pop(entry.session, None)
        for each in (entry, later) if later is not None else (entry,):
            self._over(each)
            _refuse(each, error)
        self._on_lost(entry.session, told, error)

    def _over(self, entry: _Entry) -> None:
        self._writing.pop(entry.session, None)
        if self._ending.get(entry.session.id) is entry:
            del self._ending[entry.session.id]

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


async def _written(entry: _Entry) -> None:
    waiter = asyncio.get_running_loop().create_future()
    entry.waiters.append(waiter)
    await waiter


def _refuse(entry: _Entry, error: CarouselError) -> None:
    for waiter in entry.waiters:
        if not waiter.done():
            waiter.set_exception(error)


def tombstone(record: Record, gone: str) -> Record:
    """What is left of a session that is no more."""
    return replace(record, payload=b"", gone=gone, expires_at=time.time() + TOMBSTONE_S)


def has_expired(record: Record) -> bool:
    """Whether a record is only remembered: its session was idle for its lifetime."""
    return not record.gone and time.time() > record.expires_at - TOMBSTONE_S


def idle_s(record: Record, lifetime_s: float) -> float:
    """Seconds since a session was written, where its server's lifetime is this one's."""
    return max(0.0, time.time() - (record.expires_at - TOMBSTONE_S - lifetime_s))
