"""Real bundles, and real servers on ephemeral ports."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from tests.support.models import Speaker, Tagger, make
from tests.support.shared import make_once

import carousel_export as cx
from carousel_server.config import ServerConfig
from carousel_server.serve import Server, serving

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture of their module run in one process, which then makes it once."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        known = [definition for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
        if any(definition.scope == "module" for definition in known):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with `tagger` (bidirectional) and `speaker` (causal, token ids), exported for real."""

    def make_models(folder: Path) -> None:
        torch.manual_seed(1)
        cx.export(make(Tagger), torch.randn(3, 6, 5), name="tagger", out=folder, policy=cx.Lookahead(block=4, ahead=2))
        cx.export(make(Speaker), torch.randint(0, 11, (3, 6)), name="speaker", out=folder)

    return make_once(tmp_path_factory, "models", make_models)


@pytest.fixture
def config(models: Path) -> ServerConfig:
    return ServerConfig(models=models, listen="127.0.0.1:0", drain_timeout_s=0.2)


@pytest.fixture
async def server(config: ServerConfig, request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """A server; `@pytest.mark.settings(max_sessions=2)` changes its settings."""
    marker = request.node.get_closest_marker("settings")
    async with serving(replace(config, **(marker.kwargs if marker else {}))) as running:
        yield running


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened
