"""The store of replicas when its server is killed, hangs, is full, is locked up behind a password, or is a stranger."""

import asyncio
import itertools
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from tests.durability.batch import BATCH, holding, number_in, numbered, payloads
from tests.durability.conftest import SERVERS
from tests.support.certificates import LOCAL, Authority
from tests.support.redis_server import RedisServer

from carousel_server.errors import ConfigError, StoreError
from carousel_server.store.open_store import open_store
from carousel_server.store.redis import RedisStore
from carousel_server.store.store import Store

PASSWORD = "p@ss/w#rd?"
ESCAPED = "p%40ss%2Fw%23rd%3F"


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own, which writes each commit to the disk."""
    marker = request.node.get_closest_marker("settings")
    running = RedisServer(request.param, tmp_path, **(marker.kwargs if marker else {}))
    yield running
    running.kill()


async def commit_until_it_fails(store: Store, number: int) -> int:
    """Commit from `number` on; the last that was acknowledged."""
    while True:
        try:
            await store.commit(holding(numbered(number)))
        except StoreError:
            return number - 1
        number += 1


async def test_a_killed_server_loses_nothing_acknowledged(server: RedisServer) -> None:
    """A redis killed in the midst of commits has all that it acknowledged when it is back; the store reconnects."""
    store = open_store(server.url)
    number = 1
    for _ in range(3):
        await store.commit(holding(numbered(number)))
        asyncio.get_running_loop().call_later(0.05, server.kill)
        done = await commit_until_it_fails(store, number)
        server.start()
        found = await number_in(store)
        assert found in (done, done + 1)
        number = found + 1
    await store.close()


async def test_a_server_that_does_not_answer(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A redis that hangs is a StoreError after the time of a call, and the store works once the redis goes on."""
    store = open_store(server.url, timeout_s=1.0)
    await store.commit(BATCH)
    server.pause()
    calls = (store.commit(holding(b"late")), store.claim("s"), store.read("s"), store.list(None, limit=1))
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(answer, StoreError)
        assert answer.retry_after_s is not None
    assert caplog.text.count(f"{server.url}/0: no answer within 1 s") == len(calls)
    server.go_on()
    assert await store.commit(holding(b"next")) == set()
    assert await payloads(store) == {b"next"}
    await store.close()


async def test_a_late_commit_never_follows_the_next(server: RedisServer) -> None:
    """A commit that was given up, and that the server runs after the one that came next, changes nothing."""
    store = open_store(server.url)
    assert isinstance(store, RedisStore)
    await store.commit(BATCH)
    await store.commit(holding(b"next"))
    store._writes = itertools.count(1)
    assert await store.commit(holding(b"late")) == set()
    assert await payloads(store) == {b"next"}
    await store.close()


async def test_a_full_server(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A redis at its maxmemory is a StoreError that says so, keeps what it has, and works when there is room."""
    store = open_store(server.url)
    assert isinstance(store, RedisStore)
    await store.commit(BATCH)
    await store._redis.config_set("maxmemory", 1)
    with pytest.raises(StoreError):
        await store.commit(holding(b"next"))
    assert "maxmemory" in caplog.text
    assert await payloads(store) == {b"first"}
    await store._redis.config_set("maxmemory", 0)
    assert await store.commit(holding(b"next")) == set()
    await store.close()


@pytest.mark.settings(requirepass=PASSWORD)
async def test_a_password(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """The URL's password opens the redis, with any signs in it; a wrong one is a StoreError; neither is ever told."""
    caplog.set_level(logging.DEBUG)
    store = open_store(f"redis://:{ESCAPED}@127.0.0.1:{server.port}")
    assert await store.commit(BATCH) == set()
    stranger = open_store(f"redis://:wr0ng@127.0.0.1:{server.port}")
    with pytest.raises(StoreError) as caught:
        await stranger.read("s")
    assert stranger.name in caplog.text
    told = f"{store.name} {store!r} {stranger.name} {caught.value} {caught.value.__cause__!r} {caplog.text}"
    assert not any(secret in told for secret in (PASSWORD, ESCAPED, "wr0ng"))
    await store.close()
    await stranger.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:s3cr/et@127.0.0.1", "in a password are written as %2F"),
        ("redis://:s3cr?et=1@127.0.0.1", "cannot be read"),
        ("redis://:1?s3cret=1@127.0.0.1", "knows only prefix"),
        ("redis://:1#s3cret@127.0.0.1", "in a password are written as %2F"),
        ("redis://:s3cret@127.0.0.1:99999", "cannot be read"),
        ("redis://:s3cret@127.0.0.1/sessions", "cannot be read"),
        ("redis://:s3cret@127.0.0.1?password=s3cret", "redis:// knows only prefix"),
        ("redis://:s3cret@127.0.0.1?ssl_ca_certs=ca.pem", "redis:// knows only prefix"),
        ("rediss://:s3cret@127.0.0.1?ssl_ca_certs=missing.pem", "there is no such file"),
        ("redis:s3cret", "must be memory, sqlite:FILE, redis://"),
        ("reddis://:s3cret@127.0.0.1", "must be memory, sqlite:FILE, redis://"),
        ("memory:s3cret", "must be memory, sqlite:FILE, redis://"),
        ("sqlite:", "must be memory, sqlite:FILE, redis://"),
        ("sqlite:sessions.db?mode=off", "only .synchronous=full and .synchronous=normal"),
        ("", "must be memory, sqlite:FILE, redis://"),
    ],
)
def test_what_no_store_is_called(url: str, says: str) -> None:
    """Anything that names no store is refused in one line that says what does, and that tells no password."""
    with pytest.raises(ConfigError, match=says) as caught:
        open_store(url)
    assert "s3cr" not in f"{caught.value}{caught.value.__cause__!r}"
    assert "\n" not in str(caught.value)


@asynccontextmanager
async def tls_before(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[int]:
    """A port with TLS that leads to the server, as stunnel has it; the wheels' servers are built without."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as front:
        yield front.sockets[0].getsockname()[1]


async def test_tls(server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """rediss:// encrypts, and trusts only a certificate for the server's name, by the authority that was given."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    own = authority.pair("redis", LOCAL)
    other = authority.pair("elsewhere", [x509.DNSName("redis.example")])
    for pair, trusts, trusted in ((own, authority, True), (own, stranger, False), (other, authority, False)):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pair.certificate, pair.key)
        async with tls_before(server, context) as port:
            store = open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={trusts.path}")
            if trusted:
                assert await store.commit(BATCH) == set()
                assert await payloads(store) == {b"first"}
            else:
                caplog.clear()
                with pytest.raises(StoreError):
                    await store.commit(BATCH)
                assert "certificate verify failed" in caplog.text
            await store.close()
