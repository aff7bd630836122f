"""What a store keeps when its writer is killed in the midst of commits."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.durability.batch import SESSIONS, number_in
from tests.durability.conftest import SERVERS
from tests.support.redis_server import RedisServer

from carousel_server.store.open_store import open_store


@pytest.fixture(params=["sqlite", *SERVERS])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store that outlives its writer."""
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path / 'sessions.db'}"
        return
    server = RedisServer(request.param, tmp_path, appendfsync="no")
    yield server.url
    server.kill()


def write_and_be_killed(spec: str, after_s: float) -> int:
    """The last commit that the writer said was done before it was killed."""
    command = [sys.executable, Path(__file__).with_name("batch.py"), spec]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = writer.stdout.readline()
        time.sleep(after_s)
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read()
    return int(said.split("\n")[-2])


async def test_a_killed_writer_leaves_whole_commits(spec: str) -> None:
    """After each of six kill -9 the store has the last commit that was acknowledged, or the one after it, whole."""
    draw = random.Random(5)
    before = 0
    for _ in range(6):
        done = write_and_be_killed(spec, draw.uniform(0, 0.05))
        assert done > before
        store = open_store(spec)
        before = await number_in(store)
        assert before in (done, done + 1)
        assert len(await store.list(None, limit=100)) == len(SESSIONS)
        await store.close()
