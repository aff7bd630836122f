"""What every store promises: one record a session, and one process that may write it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from carousel_server.errors import StoreError

log = logging.getLogger("carousel")

# Seconds after which a call that has no answer is a `StoreError`.
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Record:
    """What one session is after one commit."""

    session_id: str
    # The fencing number: `claim` raises it, and so may the process that holds the session. From 1 to 2**53.
    epoch: int
    # The principal that opened the session; "" without tokens.
    owner: str
    model: str
    version: str
    # Opaque to the store; b"" for a tombstone.
    payload: bytes
    # "" for a live session, else why it is gone, such as "closed": a tombstone, which answers late retries.
    gone: str
    # Unix seconds, finite; the store forgets the record after that.
    expires_at: float


def failed(name: str, why: str) -> StoreError:
    """The error of a store: its address and what it said are for the operator's log, and not for clients."""
    log.warning("the store %s: %s", name, why)
    return StoreError("the session store failed or is full; try again later")


class Store(Protocol):
    """Records by session id, shared by all processes that open the same store.

    A session is held by the store object that wrote its first record or claimed it last. Every call may raise
    `StoreError`: the store was not reached, is full or took too long. Whether the call took effect is then unknown;
    each may be made again.
    """

    # What messages and logs call the store; never holds a password.
    name: str

    async def commit(self, records: Sequence[Record]) -> set[str]:
        """Write these records, of different sessions, in one transaction; the ids of those that were refused.

        A record is written where there is none, where this object holds the session and the stored epoch is not newer,
        and over a tombstone of an older epoch: a new session under the name of one that is gone. All others are refused
        and stay as they are: another process has the session.
        """
        ...

    async def claim(self, session_id: str, *, epoch: int | None = None) -> Record | None:
        """Become the session's holder and give its record, its epoch raised by one; None where there is none.

        With `epoch`, only where the record has that one; None where it has another. A tombstone is given as it is and
        changes neither its epoch nor its holder.
        """
        ...

    async def read(self, session_id: str) -> Record | None:
        """The record as it is, whoever holds the session; None where there is none."""
        ...

    async def list(self, owner: str | None, *, limit: int, after: str = "") -> list[Record]:
        """Up to `limit` live sessions of an owner (None: of all) with ids after `after`, by id, without payloads."""
        ...

    async def drop(self, session_id: str) -> bool:
        """Forget a record; whether there was one.

        It fences nobody: to end a session that another process may hold, claim it and commit a tombstone.
        """
        ...

    async def sweep(self, now: float) -> int:
        """Free the room of what expired by `now`, in Unix seconds; how many records this deleted.

        No call ever gives an expired record, swept or not.
        """
        ...

    async def close(self) -> None:
        """Let go of the file or the connections."""
        ...
