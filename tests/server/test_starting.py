"""A server that answers, and has not loaded its models yet."""

import asyncio
import time

import grpc
import pytest
from tests.support.stream import RawStream, open_item, reason, retry_info

from carousel_server.config import ServerConfig
from carousel_server.engine.catalogue import Catalogue
from carousel_server.serve import Server


@pytest.mark.parametrize("model", ["speaker", "tagger"])
async def test_a_server_that_starts_asks_for_patience(config: ServerConfig, monkeypatch, model: str):
    """What asks for a model before its turn to be loaded is told when to come back, and not that it is not there."""
    build = Catalogue._build

    def slowly(*arguments):
        time.sleep(0.5)
        return build(*arguments)

    monkeypatch.setattr(Catalogue, "_build", slowly)
    server = Server(config)
    starting = asyncio.create_task(server.start())
    while not server.port:  # noqa: ASYNC110 (no event tells)
        await asyncio.sleep(0.001)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel, RawStream(channel) as stream:
        failed = (await stream.ask(open_item("s", model))).failed
        assert reason(failed.status) == "MODEL_LOADING"
        assert retry_info(failed.status) is not None
        await starting
        assert (await stream.ask(open_item("s", model))).HasField("opened")
    await server.stop()
