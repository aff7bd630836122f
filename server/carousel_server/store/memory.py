"""Records in this process's memory: sessions that nobody needs after it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

from carousel_server.store.store import Record


@dataclass(frozen=True, slots=True)
class _Held:
    record: Record
    holder: object


class Shelf(dict[str, _Held]):
    """Records that several `MemoryStore`s in one process share, as replicas share a redis."""


class MemoryStore:
    """See `Store`. Never raises `StoreError`."""

    name = "memory"

    def __init__(self, shelf: Shelf | None = None) -> None:
        self._shelf = Shelf() if shelf is None else shelf

    async def commit(self, records: Sequence[Record]) -> set[str]:
        now = time.time()
        refused = {record.session_id for record in records if not self._may_write(record, now)}
        for record in records:
            if record.session_id not in refused:
                self._shelf[record.session_id] = _Held(record, self)
        return refused

    async def claim(self, session_id: str, *, epoch: int | None = None) -> Record | None:
        if (record := await self.read(session_id)) is not None and epoch not in (None, record.epoch):
            return None
        if record is not None and not record.gone:
            record = replace(record, epoch=record.epoch + 1)
            self._shelf[session_id] = _Held(record, self)
        return record

    async def read(self, session_id: str) -> Record | None:
        held = self._find(session_id, time.time())
        return None if held is None else held.record

    async def list(self, owner: str | None, *, limit: int, after: str = "") -> list[Record]:
        now = time.time()
        live = (
            held.record.session_id
            for held in self._shelf.values()
            if not held.record.gone and held.record.expires_at > now and owner in (None, held.record.owner)
        )
        ids = nsmallest(limit, (session_id for session_id in live if session_id > after))
        return [replace(self._shelf[session_id].record, payload=b"") for session_id in ids]

    async def drop(self, session_id: str) -> bool:
        known = self._find(session_id, time.time()) is not None
        self._shelf.pop(session_id, None)
        return known

    async def sweep(self, now: float) -> int:
        expired = [session_id for session_id, held in self._shelf.items() if held.record.expires_at <= now]
        for session_id in expired:
            del self._shelf[session_id]
        return len(expired)

    async def close(self) -> None:
        """What other stores on the shelf hold stays."""

    def _find(self, session_id: str, now: float) -> _Held | None:
        held = self._shelf.get(session_id)
        return None if held is None or held.record.expires_at <= now else held

    def _may_write(self, record: Record, now: float) -> bool:
        held = self._find(record.session_id, now)
        if held is None or (held.holder is self and held.record.epoch <= record.epoch):
            return True
        return bool(held.record.gone) and held.record.epoch < record.epoch
