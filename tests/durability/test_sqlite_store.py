"""The store of one machine when its disk is full, its file is locked, shared or somebody else's."""

import asyncio
import resource
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.durability.batch import BATCH, SESSIONS, holding, payloads

from carousel_server.errors import ConfigError, StoreError
from carousel_server.store.open_store import open_store
from carousel_server.store.sqlite import SqliteStore

Full = Callable[[SqliteStore], AbstractContextManager[None]]


@contextmanager
def no_page_more(store: SqliteStore) -> Iterator[None]:
    """SQLite's own limit: the error of a full disk."""
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    yield
    store._connection.execute("PRAGMA max_page_count = 1000000")


@contextmanager
def no_larger_file(store: SqliteStore) -> Iterator[None]:
    """The kernel's limit: it refuses to write beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("full", "says"), [(no_page_more, "database or disk is full"), (no_larger_file, "disk I/O error")]
)
async def test_a_full_disk(tmp_path: Path, full: Full, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing more can be written, a commit is a StoreError and changes nothing; it works when there is room."""
    store = SqliteStore(tmp_path / "sessions.db")
    await store.commit(BATCH)
    large = holding(bytes(100_000))
    with full(store):
        for _ in range(3):
            caplog.clear()
            with pytest.raises(StoreError) as caught:
                await store.commit(large)
            assert says in caplog.text
            assert str(tmp_path) not in str(caught.value)
        assert await payloads(store) == {b"first"}
    assert await store.commit(large) == set()
    assert await payloads(store) == {bytes(100_000)}
    await store.close()


async def test_a_file_that_another_process_locks(tmp_path: Path) -> None:
    """A transaction of another process that does not end is a StoreError after the time of a call, then all works."""
    store = SqliteStore(tmp_path / "sessions.db", timeout_s=1.0)
    await store.commit(BATCH)
    with sqlite3.connect(tmp_path / "sessions.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = (store.commit(holding(b"late")), store.claim(SESSIONS[0]), store.drop(SESSIONS[0]))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, StoreError) for answer in answers)
        other.execute("ROLLBACK")
    other.close()
    assert await store.commit(holding(b"next")) == set()
    assert await payloads(store) == {b"next"}
    await store.close()


async def test_calls_that_wait_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Behind a disk that hangs no more than a bounded number of calls waits; the next are refused at once."""
    store = SqliteStore(tmp_path / "sessions.db", timeout_s=1.0)
    disk = threading.Event()
    store._thread.submit(disk.wait)
    answers = await asyncio.gather(*(store.claim("s") for _ in range(1030)), return_exceptions=True)
    assert all(isinstance(answer, StoreError) for answer in answers)
    assert caplog.text.count("1024 calls wait already") == 6
    disk.set()
    await asyncio.wrap_future(store._thread.submit(disk.is_set))
    assert await store.commit(BATCH) == set()
    await store.close()


async def test_a_call_that_was_given_up(tmp_path: Path) -> None:
    """A call that was given up before its turn came never takes effect."""
    store = SqliteStore(tmp_path / "sessions.db", timeout_s=1.0)
    await store.commit(BATCH)
    disk = threading.Event()
    store._thread.submit(disk.wait)
    with pytest.raises(StoreError):
        await store.commit(holding(b"late"))
    disk.set()
    assert await payloads(store) == {b"first"}
    await store.close()


async def test_processes_on_one_file(tmp_path: Path) -> None:
    """Processes that open a new file at once and write it at once wait for each other, and lose nothing."""
    file = tmp_path / "sessions.db"
    stores = await asyncio.gather(*(asyncio.to_thread(SqliteStore, file) for _ in range(6)))
    for turn in range(10):
        mine = [
            store.commit([replace(BATCH[0], session_id=f"{number}", payload=b"%d" % turn)])
            for number, store in enumerate(stores)
        ]
        assert await asyncio.gather(*mine) == [set()] * len(stores)
    assert [(await stores[0].read(f"{number}")).payload for number in range(6)] == [b"9"] * 6  # type: ignore[union-attr]
    for store in stores:
        await store.close()


def test_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """What a store writes to disk, its log included, can be read by the user that runs the server and nobody else."""
    with asyncio.Runner() as runner:
        store = open_store(f"sqlite:{tmp_path / 'sessions.db'}")
        runner.run(store.commit(BATCH))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert modes == {"sessions.db": 0o600, "sessions.db-wal": 0o600, "sessions.db-shm": 0o600}
        runner.run(store.close())


@pytest.mark.parametrize(("level", "number"), [("", 2), ("?synchronous=full", 2), ("?synchronous=normal", 1)])
async def test_what_a_commit_waits_for(tmp_path: Path, level: str, number: int) -> None:
    """Commits wait for the disk unless synchronous=normal is asked for."""
    store = open_store(f"sqlite:{tmp_path / 'sessions.db'}{level}")
    assert isinstance(store, SqliteStore)
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (number,)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_files_that_are_no_store(tmp_path: Path) -> None:
    """A newer format, another program's database, any other file: each is refused in a line and stays as it is."""
    newer, other, text = (tmp_path / name for name in ("newer.db", "other.db", "text"))
    await SqliteStore(newer).close()
    for file, statement in ((newer, "PRAGMA user_version = 2"), (other, "CREATE TABLE birds (name)")):
        with sqlite3.connect(file) as connection:
            connection.execute(statement)
        connection.close()
    text.write_bytes(b"dear diary " * 100)
    before = {file: file.read_bytes() for file in (newer, other, text)}
    for file, says in (
        (newer, "format 2 and this Carousel knows format 1: run the Carousel that wrote it"),
        (other, "another program's database"),
        (text, "file is not a database"),
        (tmp_path / "missing" / "sessions.db", "cannot be made: No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            open_store(f"sqlite:{file}")
        assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in before} == before
