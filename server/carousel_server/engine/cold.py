"""Sessions that the store has and memory has not: how they come back for whoever asks, and what they are meanwhile."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from weakref import WeakValueDictionary

from carousel_protos.v1.state_pb2 import SessionState
from carousel_server.config import Limits
from carousel_server.engine.asked import Asked
from carousel_server.engine.catalogue import Catalogue
from carousel_server.engine.events import Failure, Sink
from carousel_server.engine.held import Holds
from carousel_server.engine.keeper import Keeper, has_expired, tombstone
from carousel_server.engine.policy import Blocking
from carousel_server.engine.portable import unseal
from carousel_server.engine.resident import Resident
from carousel_server.engine.room import Room
from carousel_server.engine.sessions import Sessions
from carousel_server.engine.view import SessionView
from carousel_server.errors import (
    AlreadyExistsError,
    CarouselError,
    FencedError,
    NotOwnerError,
    SessionClosedError,
    SessionExpiredError,
    StoreError,
)
from carousel_server.store.store import Record

log = logging.getLogger("carousel")

# Records that are listed in one go.
_PAGE = 200


class ColdSessions:
    """Use within one event loop."""

    def __init__(self, sessions: Sessions, catalogue: Catalogue, keeper: Keeper, limits: Limits) -> None:
        self._sessions = sessions
        self._catalogue = catalogue
        self._keeper = keeper
        self._limits = limits
        self._holds = Holds()
        # One at a time takes up a session.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.room = Room(sessions, keeper, limits, self.may_leave, self._left)

    def __len__(self) -> int:
        """Sessions that streams hold and that are not in memory."""
        return len(self._holds)

    def held(self, session_id: str, sink: Sink) -> bool:
        """Whether this stream holds the session, which has left memory meanwhile."""
        return (hold := self._holds.get(session_id)) is not None and hold.sink is sink

    def taken(self, session_id: str, sink: Sink) -> None:
        """A stream has a session of that name now; another one that held it is told."""
        hold = self._holds.take(session_id)
        if hold is not None and hold.sink is not sink:
            hold.sink.deliver(Failure(session_id, FencedError(f"a newer stream resumed session {session_id}")))

    def detach(self, sink: Sink) -> None:
        self._holds.detach(sink)

    async def look(self, session_id: str, owner: str) -> Record | Resident | None:
        """A live session as it is now: in memory, where no other server has had it since, or as the store has it.

        Raises `NotOwnerError`, `StoreError`.
        """
        record, here = await self._look(session_id)
        if here is not None or record is None or record.gone or has_expired(record):
            return here
        _check_owner(record, owner)
        return record

    async def bring(self, asked: Asked) -> None:
        """Have in memory what the store knows of a session that is asked for, which is then this server's.

        Room is made for a new one. What would be refused is not touched. Raises `AlreadyExistsError`, `FencedError`,
        `SessionDiffersError`, `NotOwnerError`, `TooManySessionsError`, `StoreError`, and what a model raises that is
        not served or has no room.
        """
        if asked.session_id:
            async with self._lock(asked.session_id):
                while not await self._settle(asked):
                    pass
        if not asked.resume and self._sessions.peek(asked.session_id) is None:
            await self.room.make()

    async def _settle(self, asked: Asked) -> bool:
        """False where another server was faster and all is to be looked at again."""
        record, here = await self._look(asked.session_id)
        if record is None or here is not None:
            return True  # what is in memory decides
        _check_owner(record, asked.owner)
        if has_expired(record):
            return await self._end(record)
        if record.gone:
            await self._bury(record, asked)
            return True
        state = unseal(record.payload)
        if not asked.takes_up(state.holder):
            raise AlreadyExistsError(f"session {record.session_id} is open already; resume it, or choose another id")
        policy = state.policy
        former = self._catalogue.former(record.model, record.version)
        asked.check_same(record.model, record.version, Blocking(policy.kind, policy.block, policy.ahead), former)
        return await self._claim(record, state) is not None

    async def bring_held(self, session_id: str, sink: Sink) -> None:
        """Have a session in memory again for the stream that holds it.

        Raises `FencedError` where another has taken it since, what a session that is gone raises, `StoreError`,
        `TooManySessionsError`, and what a model raises that is not served or has no room.
        """
        async with self._lock(session_id):
            while (hold := self._holds.get(session_id)) is not None and hold.sink is sink:
                record, here = await self._look(session_id)
                if here is None and (record is None or record.gone or has_expired(record)):
                    self._holds.take(session_id)
                    raise _gone(session_id, record)
                if here is not None or record is None or record.epoch != hold.epoch:
                    self._holds.take(session_id)
                    raise FencedError(f"session {session_id} was taken over meanwhile; resume it to take it back")
                if (resident := await self._claim(record, unseal(record.payload))) is not None:
                    if self.held(session_id, sink):
                        self._holds.take(session_id)
                        self._sessions.attach(resident, sink)
                    return

    async def _look(self, session_id: str) -> tuple[Record | None, Resident | None]:
        """What the store has, and what memory has, unless another server has had it since."""
        while True:
            record = await self._keeper.store.read(session_id)
            with suppress(FencedError):
                if await self._keeper.ended(session_id):
                    continue
            here = self._sessions.peek(session_id)
            if here is not None and record is not None and record.epoch > here.session.known_epoch:
                if self._keeper.holds(here.session):  # the epoch may be this server's own
                    with suppress(FencedError):
                        await self._keeper.settled(here.session)
                    continue
                self._lose(here)
                here = None
            return record, here

    async def _claim(self, record: Record, state: SessionState) -> Resident | None:
        """Have a session in memory, as its only owner; None where another server was faster.

        It is built first, so that nobody loses a session that this server cannot take.
        """
        resident = await self._restore(record, state)
        session_id, moved = record.session_id, resident.model.version != record.version
        claimed: Record | None = None
        try:
            claimed = await self._keeper.store.claim(session_id, epoch=record.epoch)
        finally:
            if claimed is None:
                self._keeper.leave(resident.session)
                self._sessions.evict(resident)
        if claimed is None:
            return None
        resident.session.epoch = resident.session.known_epoch = claimed.epoch
        if moved:
            self._keeper.changed(resident.session)
        return resident

    async def _restore(self, record: Record, state: SessionState) -> Resident:
        """Build a session on its version, or on the one that it goes on with."""
        await self._catalogue.prepare(record.model, record.version)
        await self.room.make()
        served, now = self._catalogue.home(record.model, record.version), time.monotonic()
        move = served.version != record.version
        return self._sessions.restore(served, record.session_id, state, record.owner, now, move=move)

    async def _end(self, record: Record) -> bool:
        """Leave a tombstone of a session that expired where nobody had it in memory: its name is free again."""
        claimed = await self._keeper.store.claim(record.session_id, epoch=record.epoch)
        if claimed is None:
            return False
        buried = tombstone(claimed, "expired")
        if await self._keeper.store.commit([buried]):
            return False
        self._remember(buried)
        return True

    async def _bury(self, record: Record, asked: Asked) -> None:
        """The session is gone. To who had it, its last answers can still be given."""
        session_id = record.session_id
        if not record.payload or self._sessions.has_answers(session_id):
            self._remember(record)
            return
        state = unseal(record.payload)
        if not (asked.resume or asked.holder == state.holder):
            self._remember(record)
            return
        resident = await self._restore(record, state)
        self._keeper.leave(resident.session)
        resident.session.epoch = record.epoch
        self._sessions.retire(resident, _gone(session_id, record))

    def _remember(self, record: Record) -> None:
        if not self._sessions.has_answers(record.session_id):
            error = _gone(record.session_id, record)
            self._sessions.remember(record.session_id, record.owner, record.epoch, error)

    def _lose(self, here: Resident) -> None:
        self._keeper.leave(here.session)
        error = FencedError(f"another server has had session {here.session.id} meanwhile; resume it to take it back")
        self._sessions.lose(here.session, here.session.sink, error)

    def _lock(self, session_id: str) -> asyncio.Lock:
        return self._locks.setdefault(session_id, asyncio.Lock())

    # What the store has, for lists

    async def views(self, owner: str, model: str, after: str, most: int, beyond: str | None) -> list[SessionView]:
        """At most `most` of the owner's sessions that only the store has, by id, behind `after` and up to `beyond`.

        Those are among them that are in memory as they were before another server had them. Raises `StoreError`.
        """
        views: list[SessionView] = []
        async for listed in self._listed(owner, after):
            if len(views) == most or (beyond is not None and listed.session_id > beyond):
                break
            here = self._sessions.peek(listed.session_id)
            if model not in ("", listed.model) or (here is not None and listed.epoch <= here.session.epoch):
                continue
            # One after the other, since each may hold many frames.
            record = await self._keeper.store.read(listed.session_id)
            if record is None or record.gone or record.owner != owner:
                continue  # it went meanwhile
            attached = self._holds.get(record.session_id) is not None
            views.append(SessionView.of_record(record, self._limits.idle_timeout_s, attached=attached))
        return views

    async def _listed(self, owner: str, after: str) -> AsyncIterator[Record]:
        """Live ones, without payloads."""
        while page := await self._keeper.store.list(owner, limit=_PAGE, after=after):
            for record in page:
                if not has_expired(record):
                    yield record
            after = page[-1].session_id

    # How they leave, and are over

    def may_leave(self, resident: Resident) -> bool:
        """Whether nobody is about to take it up."""
        lock = self._locks.get(resident.session.id)
        return lock is None or not lock.locked()

    def _left(self, resident: Resident) -> None:
        session = resident.session
        if session.sink is not None:
            self._holds.add(session, session.sink, time.monotonic())

    async def sweep(self, now: float) -> None:
        """Those unused for long leave memory, and as many more as it is too full by; what expired is forgotten."""
        await self.room.sweep(now)
        lifetime = self._limits.idle_timeout_s
        for session_id, hold in self._holds.take_before(now - lifetime):
            error = SessionExpiredError(
                f"session {session_id} expired after {lifetime:g} s without use; open a new one"
            )
            self._sessions.remember(session_id, hold.owner, hold.epoch, error)
            hold.sink.deliver(Failure(session_id, error))
        try:
            await self._keeper.store.sweep(time.time())
        except StoreError as error:
            log.warning("%s; it is swept later", error)

    def save_all(self) -> None:
        """Have every session written that the store has not as it is."""
        self._keeper.save_unstored([resident.session for resident in self._sessions.all()])


def _gone(session_id: str, record: Record | None) -> CarouselError:
    if record is not None and record.gone == "closed":
        return SessionClosedError(f"session {session_id} was closed; open a new one")
    return SessionExpiredError(f"session {session_id} expired; open a new one")


def _check_owner(record: Record, owner: str) -> None:
    if record.owner != owner:
        raise NotOwnerError(f"session {record.session_id} is not yours; open one under another id")
