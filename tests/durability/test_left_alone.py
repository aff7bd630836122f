"""Sessions that are left alone on a stream that goes on."""

import asyncio
from dataclasses import replace

import pytest
from tests.support.stream import RawStream, chunk_item, open_item, reason

from carousel_server.config import ServerConfig
from carousel_server.serve import Server, serving


@pytest.fixture
async def server(config: ServerConfig, tmp_path):
    settings = {"store": f"sqlite:{tmp_path / 'sessions'}?synchronous=normal", "cold_after_s": 0.2}
    async with serving(replace(config, idle_timeout_s=1.0, **settings)) as running:
        yield running


async def test_a_cold_session_that_expires_is_told_and_leaves_nothing(server: Server, channel):
    """A session that only the store has expires as one in memory does: its stream is told, and keeps nothing of it."""
    async with RawStream(channel) as stream:
        for name in ("a", "b"):
            await stream.send(open_item(name, "speaker"), chunk_item(name, 0, [1, 2]))
            assert [(await stream.receive()).WhichOneof("item") for _ in range(2)] == ["opened", "result"]
        while server.engine.sessions.peek("a") or server.engine.sessions.peek("b"):  # noqa: ASYNC110 (no event tells)
            await asyncio.sleep(0.02)
        for _ in range(2):
            failed = (await stream.receive()).failed
            assert failed.session_id in {"a", "b"}
            assert reason(failed.status) == "SESSION_EXPIRED"
        (call,) = server._native._calls
        assert not call._held
        assert len(server.engine.cold) == 0
        again = (await stream.ask(chunk_item("a", 1, [3]))).failed
        assert reason(again.status) in {"SESSION_EXPIRED", "SESSION_NOT_FOUND"}
