"""Sessions that the store has and memory has not: how they leave, and how they come back for whoever asks."""

import asyncio
import logging
import time
from dataclasses import replace
from itertools import takewhile
from weakref import WeakValueDictionary

from carousel_server.config import Limits
from carousel_server.engine.catalogue import Catalogue
from carousel_server.engine.events import Failure, Sink
from carousel_server.engine.keeper import TOMBSTONE_S, Keeper, has_expired
from carousel_server.engine.portable import unseal
from carousel_server.engine.resident import Resident
from carousel_server.engine.sessions import Sessions
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

# Above this share of the sessions that memory may hold, those unused for longest leave.
_HIGH = 0.9
# Sessions that leave in one go, before others get their turn.
_TURN = 200


class ColdSessions:
    """Use within one event loop."""

    def __init__(self, sessions: Sessions, catalogue: Catalogue, keeper: Keeper, limits: Limits) -> None:
        self._sessions = sessions
        self._catalogue = catalogue
        self._keeper = keeper
        self._limits = limits
        # Those that a stream holds, by when they were used last, the first to leave first: a stream asks for no resume
        # before its next chunk.
        self._held: dict[Sink, dict[str, float]] = {}
        # One at a time takes up a session.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def held(self, session_id: str, sink: Sink) -> bool:
        """Whether this stream holds the session, which has left memory meanwhile."""
        return session_id in self._held.get(sink, ())

    def detach(self, sink: Sink) -> None:
        self._held.pop(sink, None)

    async def read(self, session_id: str, owner: str) -> Record | None:
        """What the store has of a live session. Raises `NotOwnerError`, `StoreError`."""
        record = await self._keeper.store.read(session_id)
        if record is None or record.gone or has_expired(record):
            return None
        _check_owner(record, owner)
        return record

    async def bring(self, session_id: str, owner: str, *, resume: bool, holder: str = "") -> None:
        """Have in memory what the store knows of a session, which is then this server's, before a stream opens it.

        Without `resume` and by another than its holder, it is only looked at. Raises `AlreadyExistsError`,
        `NotOwnerError`, `StoreError`, and what a model that is not served or has no room raises.
        """
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        async with lock:
            here = self._sessions.peek(session_id)
            record = await self._keeper.store.read(session_id)
            if record is None:
                return
            _check_owner(record, owner)
            if here is None and has_expired(record):
                record = await self._end(record)
            if record.gone:
                self._bury(record, here)
            elif resume or self._is_holder(record, holder):
                await self._claim(session_id)
            elif here is None:
                raise AlreadyExistsError(f"session {session_id} is open already; resume it, or choose another id")

    async def bring_held(self, session_id: str, sink: Sink, owner: str) -> None:
        """Have a session in memory again for the stream that holds it; see `bring`. Where that fails, none holds it."""
        if not self.held(session_id, sink):
            return  # it expired meanwhile, and the stream was told
        self._release(session_id, sink)
        await self.bring(session_id, owner, resume=True)
        if (resident := self._sessions.peek(session_id)) is not None and resident.session.sink is None:
            self._sessions.resume(resident, sink, time.monotonic(), resident.session.holder)

    def _release(self, session_id: str, sink: Sink) -> None:
        del self._held[sink][session_id]
        if not self._held[sink]:
            del self._held[sink]

    async def _claim(self, session_id: str) -> None:
        here = self._sessions.peek(session_id)
        if here is None:
            record = await self._keeper.store.claim(session_id)
        else:
            await self._keeper.settled(here.session)
            with self._keeper.paused(here.session):
                record = await self._keeper.store.claim(session_id)
            here = self._sessions.peek(session_id)
        if record is None or record.gone:
            if record is not None:
                self._bury(record, here)
        elif here is None or here.session.epoch != record.epoch - 1:
            if here is not None:
                self._lose(here, f"another server has had session {session_id} meanwhile; resume it")
            self._restore(record, record.epoch - 1)  # which taking it up raises

    async def _end(self, record: Record) -> Record:
        """Leave a tombstone of a session that expired where nobody had it in memory: its name is free again."""
        claimed = await self._keeper.store.claim(record.session_id)
        if claimed is None or claimed.gone:
            return claimed or record
        tombstone = replace(claimed, payload=b"", gone="expired", expires_at=time.time() + TOMBSTONE_S)
        await self._keeper.store.commit([tombstone])
        return tombstone

    def _restore(self, record: Record, epoch: int) -> Resident:
        served = self._catalogue.get(record.model, record.version)
        state = unseal(record.payload)
        return self._sessions.restore(served, record.session_id, state, record.owner, epoch, time.monotonic())

    def _bury(self, record: Record, here: Resident | None) -> None:
        """The session is gone, for whoever asks now."""
        if here is not None and here.session.epoch >= record.epoch:
            return  # a new one of its name, not written yet
        if here is not None:
            self._lose(here, f"another server has ended session {record.session_id}")
        error: CarouselError = SessionClosedError(f"session {record.session_id} was closed; open a new one")
        if record.gone != "closed":
            error = SessionExpiredError(f"session {record.session_id} expired; open a new one")
        if not record.payload or self._sessions.has_answers(record.session_id):
            self._sessions.remember(record.session_id, record.owner, record.epoch, error)
            return
        resident = self._restore(record, record.epoch)
        self._keeper.leave(resident.session)
        self._sessions.retire(resident, error)

    def _lose(self, here: Resident, why: str) -> None:
        self._keeper.leave(here.session)
        self._sessions.lose(here.session, here.session.sink, FencedError(why))

    @staticmethod
    def _is_holder(record: Record, holder: str) -> bool:
        return bool(holder) and unseal(record.payload).holder == holder

    async def sweep(self, now: float) -> None:
        """Those unused for long leave memory, and as many more as it is too full by; the store forgets what expired,
        and so do the streams.
        """
        self._expire_held(now)
        residents = sorted(self._sessions.all(), key=lambda resident: resident.last_used)
        surplus = len(residents) - int(_HIGH * self._limits.max_sessions)
        for number, resident in enumerate(residents):
            if number >= surplus and now - resident.last_used < self._limits.cold_after_s:
                break
            self._evict(resident)
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)
        try:
            await self._keeper.store.sweep(time.time())
        except StoreError as error:
            log.warning("%s; it is swept later", error)

    def _expire_held(self, now: float) -> None:
        """Tell the streams of sessions that nobody used for too long, as of those in memory."""
        limit = self._limits.idle_timeout_s
        for sink, left in list(self._held.items()):
            for session_id in list(takewhile(lambda name: now - left[name] >= limit, left)):  # noqa: B023 (used up here)
                self._release(session_id, sink)
                error = SessionExpiredError(
                    f"session {session_id} expired after {limit:g} s without use; open a new one"
                )
                sink.deliver(Failure(session_id, error))

    def _evict(self, resident: Resident) -> None:
        session = resident.session
        if not session.idle or session.queued or self._sessions.peek(session.id) is not resident:
            return
        if not session.stored:
            self._keeper.save(session)  # and it leaves when it is looked at next, if nobody used it meanwhile
            return
        if session.sink is not None:
            self._held.setdefault(session.sink, {})[session.id] = resident.last_used
        self._keeper.leave(session)
        self._sessions.evict(resident)

    async def save_all(self) -> None:
        """Write every session that the store has not as it is."""
        for resident in self._sessions.all():
            if not resident.session.stored:
                self._keeper.save(resident.session)
        for resident in self._sessions.all():
            await self._keeper.settled(resident.session)


def _check_owner(record: Record, owner: str) -> None:
    if record.owner != owner:
        raise NotOwnerError(f"session {record.session_id} is not yours; open one under another id")
