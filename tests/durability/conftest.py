"""Every store on real parts: files, and servers of their own."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from tests.durability.models import export_all
from tests.support.redis_server import RedisServer
from tests.support.shared import make_once

from carousel_server.store.memory import MemoryStore, Shelf
from carousel_server.store.open_store import open_store
from carousel_server.store.store import Store

SERVERS = ("redis", "valkey")
STORES = ("memory", "sqlite", *SERVERS)

# Another process's view of the same records, as it were.
Open = Callable[[], Store]


@pytest.fixture(scope="module")
def redis_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RedisServer]]:
    """A server by its kind, shared by a module's tests."""
    running: dict[str, RedisServer] = {}

    def get(kind: str) -> RedisServer:
        if kind not in running:
            running[kind] = RedisServer(kind, tmp_path_factory.mktemp(kind), appendfsync="no")
        return running[kind]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture
def new_space(
    request: pytest.FixtureRequest, tmp_path: Path, redis_servers: Callable[[str], RedisServer]
) -> Callable[[], Open]:
    """Makes places without records, each a function that opens it."""
    kind: str = request.param

    def make() -> Open:
        name = uuid4().hex
        match kind:
            case "memory":
                shelf = Shelf()
                return lambda: MemoryStore(shelf)
            case "sqlite":
                return lambda: open_store(f"sqlite:{tmp_path / name}?synchronous=normal")
            case _:
                url = redis_servers(kind).url
                return lambda: open_store(f"{url}?prefix={name}:")

    return make


@pytest.fixture
async def opened(new_space: Callable[[], Open]) -> AsyncIterator[Open]:
    """Opens stores on the same records; all are closed at the end."""
    stores: list[Store] = []
    space = new_space()

    def make() -> Store:
        stores.append(space())
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


@pytest.fixture
def store(opened: Open) -> Store:
    return opened()


@pytest.fixture(scope="session")
def durable_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with what `export_all` makes."""
    return make_once(tmp_path_factory, "durable", export_all)
