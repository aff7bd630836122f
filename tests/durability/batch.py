"""Sessions that are committed together, each time with one value, and as a process that commits without end.

`python batch.py STORE` says the number of each commit that is done, until it is killed.
"""

import asyncio
import sys
from dataclasses import replace

from carousel_server.store.open_store import open_store
from carousel_server.store.store import Record, Store

SESSIONS = [f"session {number}" for number in range(16)]
BATCH = [Record(session_id, 1, "", "tagger", "1", b"first", "", 4e9) for session_id in SESSIONS]


def holding(payload: bytes) -> list[Record]:
    return [replace(record, payload=payload) for record in BATCH]


def numbered(number: int) -> bytes:
    """Large enough for a commit to take many writes."""
    return b"%020d" % number * 250


async def payloads(store: Store) -> set[bytes]:
    """What the sessions hold: one value, where a commit is all or nothing."""
    found = [await store.read(session_id) for session_id in SESSIONS]
    return {record.payload if record is not None else b"nothing" for record in found}


async def number_in(store: Store) -> int:
    """The commit that the sessions have, whole."""
    (payload,) = await payloads(store)
    assert payload == numbered(int(payload[:20]))
    return int(payload[:20])


async def _write(spec: str) -> None:
    store = open_store(spec)
    held = [await store.claim(record.session_id) or record for record in BATCH]
    number = 0 if held == BATCH else await number_in(store)
    while True:
        number += 1
        assert not await store.commit([replace(record, payload=numbered(number)) for record in held])
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_write(sys.argv[1]))
