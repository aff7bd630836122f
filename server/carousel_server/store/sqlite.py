"""Records in one SQLite file: sessions that survive `kill -9` and, with synchronous=full, a loss of power."""

import asyncio
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from carousel_server.errors import ConfigError
from carousel_server.store.store import TIMEOUT_S, Record, failed

Result = TypeVar("Result")

# "CARO": tells a store from any other SQLite file.
_APPLICATION = 0x4341524F
_FORMAT = 1
# Calls that may wait for the thread. What a stuck disk holds up is bounded by it.
_MOST_WAITING = 1024
# Expired records that one transaction deletes, so that commits wait little for it.
_SWEPT_AT_ONCE = 1000
# Bytes of log that a burst of commits may leave behind.
_LOG_BYTES = 64 * 1024 * 1024

# `due` is when a record has surely expired, in minutes: its index changes once a minute, not with each commit.
_SCHEMA = """
CREATE TABLE session (
  id TEXT PRIMARY KEY,
  epoch INTEGER NOT NULL,
  holder TEXT NOT NULL,
  owner TEXT NOT NULL,
  model TEXT NOT NULL,
  version TEXT NOT NULL,
  gone TEXT NOT NULL,
  expires_at REAL NOT NULL,
  due INTEGER NOT NULL,
  payload BLOB NOT NULL
);
CREATE INDEX session_due ON session (due);
CREATE INDEX session_owner ON session (owner, id) WHERE gone = '';
"""
_COMMIT = """
INSERT INTO session (id, epoch, holder, owner, model, version, gone, expires_at, due, payload)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
  epoch = excluded.epoch, holder = excluded.holder, owner = excluded.owner, model = excluded.model,
  version = excluded.version, gone = excluded.gone, expires_at = excluded.expires_at, due = excluded.due,
  payload = excluded.payload
WHERE session.holder = excluded.holder AND session.epoch <= excluded.epoch
   OR session.gone <> '' AND session.epoch < excluded.epoch
   OR session.expires_at <= ?
"""
_CLAIM = "UPDATE session SET epoch = epoch + 1, holder = ? WHERE id = ?"
_READ = """
SELECT id, epoch, owner, model, version, payload, gone, expires_at FROM session WHERE id = ? AND expires_at > ?
"""
_LIST = """
SELECT id, epoch, owner, model, version, x'', gone, expires_at FROM session
WHERE gone = '' AND id > ? AND expires_at > ? {of_owner} ORDER BY id LIMIT ?
"""
_SWEEP = """
DELETE FROM session WHERE id IN (SELECT id FROM session WHERE due <= ? LIMIT ?)
"""


class SqliteStore:
    """See `Store`. One thread has the connection, and runs the calls in the order in which they came.

    Several processes may have the same file; they wait for each other's transactions, up to the time of a call. Opening
    creates the file, readable by its owner alone. Raises `ConfigError` for a file that is no store of this format.
    """

    def __init__(self, file: Path, *, synchronous: str = "full", timeout_s: float = TIMEOUT_S) -> None:
        self.name = f"sqlite:{file}"
        self._timeout_s = timeout_s
        self._holder = uuid4().hex
        self._room = threading.BoundedSemaphore(_MOST_WAITING)
        self._connection = _connect(file, synchronous, timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def commit(self, records: Sequence[Record]) -> set[str]:
        def write() -> set[str]:
            now = time.time()
            refused = set()
            with self._transaction() as run:
                for record in records:
                    if run(_COMMIT, (*self._row(record), now)).rowcount == 0:
                        refused.add(record.session_id)
            return refused

        return await self._call(write)

    async def claim(self, session_id: str, *, epoch: int | None = None) -> Record | None:
        def take() -> Record | None:
            now = time.time()
            with self._transaction() as run:
                record = _record(run(_READ, (session_id, now)).fetchone())
                if record is None or epoch not in (None, record.epoch):
                    return None
                if record.gone:
                    return record
                run(_CLAIM, (self._holder, session_id))
                return replace(record, epoch=record.epoch + 1)

        return await self._call(take)

    async def read(self, session_id: str) -> Record | None:
        return await self._call(lambda: _record(self._connection.execute(_READ, (session_id, time.time())).fetchone()))

    async def list(self, owner: str | None, *, limit: int, after: str = "") -> list[Record]:
        def look() -> list[Record]:
            query = _LIST.format(of_owner="" if owner is None else "AND owner = ?")
            owners = () if owner is None else (owner,)
            return [Record(*row) for row in self._connection.execute(query, (after, time.time(), *owners, limit))]

        return await self._call(look)

    async def drop(self, session_id: str) -> bool:
        def delete() -> bool:
            with self._transaction() as run:
                live = run("DELETE FROM session WHERE id = ? AND expires_at > ?", (session_id, time.time())).rowcount
                return live > 0

        return await self._call(delete)

    async def sweep(self, now: float) -> int:
        def delete() -> int:
            with self._transaction() as run:
                return run(_SWEEP, (int(now // 60), _SWEPT_AT_ONCE)).rowcount

        swept = 0
        while True:
            deleted = await self._call(delete)
            swept += deleted
            if deleted < _SWEPT_AT_ONCE:
                return swept

    async def close(self) -> None:
        try:
            await self._call(self._connection.close)
        finally:
            self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread, after all that was asked before. Raises `StoreError`."""
        given_up = threading.Event()

        def run() -> Result | None:
            try:
                return None if given_up.is_set() else work()
            finally:
                self._room.release()

        if not self._room.acquire(blocking=False):
            raise failed(self.name, f"{_MOST_WAITING} calls wait already")
        answer = asyncio.wrap_future(self._thread.submit(run))
        # What fails after its caller has gone is nobody's to hear.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(self._timeout_s):
                # Not cancelled with the caller: room is released when the thread has been there.
                return cast("Result", await asyncio.shield(answer))
        except sqlite3.Error as error:
            raise failed(self.name, str(error)) from error
        except TimeoutError as error:
            raise failed(self.name, f"no answer within {self._timeout_s:g} s") from error
        finally:
            given_up.set()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """All or nothing, alone in the file from its beginning."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection.execute
            connection.execute("COMMIT")
        except BaseException:
            # Some errors, such as a full disk, have ended the transaction already.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _row(self, record: Record) -> tuple[str | int | float | bytes, ...]:
        return (
            record.session_id,
            record.epoch,
            self._holder,
            record.owner,
            record.model,
            record.version,
            record.gone,
            record.expires_at,
            math.ceil(record.expires_at / 60),
            record.payload,
        )


def _record(row: tuple[Any, ...] | None) -> Record | None:
    return None if row is None else Record(*row)


def _connect(file: Path, synchronous: str, timeout_s: float) -> sqlite3.Connection:
    try:
        # SQLite gives its log and its index the same permissions. A file that is there is never opened beside SQLite:
        # closing it would drop the locks of another connection in this process.
        if not file.exists():
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass  # another process was faster
    except OSError as error:
        raise ConfigError(f"the store's file {file} cannot be made: {error.strerror}") from error
    try:
        connection = sqlite3.connect(file, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, file, synchronous)
            _log_ahead(connection, time.monotonic() + timeout_s)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise ConfigError(f"the store's file {file} cannot be opened: {error}") from error
    return connection


def _prepare(connection: sqlite3.Connection, file: Path, synchronous: str) -> None:
    """Create the tables in a new file. Raises `ConfigError` for a file of another program or a newer format."""
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (written,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables == 0:
        for statement in filter(str.strip, _SCHEMA.split(";")):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
    elif application != _APPLICATION:
        raise ConfigError(f"{file} is another program's database: choose another file for the store")
    elif written != _FORMAT:
        raise ConfigError(
            f"the store {file} has format {written} and this Carousel knows format {_FORMAT}: "
            "run the Carousel that wrote it, or choose another file"
        )
    connection.execute("COMMIT")


def _log_ahead(connection: sqlite3.Connection, deadline: float) -> None:
    """Switch to the write-ahead log: once in a file's life, and without SQLite's own patience with other processes."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
