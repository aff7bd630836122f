"""A server that is killed while sessions run: after it came back, every answer is that of an uninterrupted run.

The server is a real process that dies of SIGKILL at an armed point, and is started again on its port; the client
resumes by itself. A chunk lost or doubled would show in every answer after it, since the state moves with each.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.models import Speaker, Tagger, looked_ahead, make, whole
from tests.support.redis_server import RedisServer
from tests.support.supervised import supervised

import carousel_client as cc

SESSIONS, CHUNKS = 8, 24


class Work:
    """Sequences on both models, cut into chunks."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.parts: list[tuple[str, list[np.ndarray]]] = []
        for number in range(SESSIONS):
            sizes = rng.integers(1, 9, CHUNKS)
            total = int(sizes.sum())
            model = ("tagger", "speaker")[number % 2]
            x = rng.standard_normal((total, 5)).astype(np.float32) if model == "tagger" else rng.integers(0, 11, total)
            self.parts.append((model, np.split(x, np.cumsum(sizes)[:-1])))

    def eager(self) -> list[np.ndarray]:
        return [
            looked_ahead(make(Tagger), torch.from_numpy(np.concatenate(chunks)), 4, 2).numpy()
            if model == "tagger"
            else whole(make(Speaker), torch.from_numpy(np.concatenate(chunks))).numpy()
            for model, chunks in self.parts
        ]

    def run(self, client: cc.Client) -> list[list[np.ndarray]]:
        def stream(model: str, chunks: list[np.ndarray]) -> list[np.ndarray]:
            with client.session(model) as session:
                return list(session.stream(chunks))

        with ThreadPoolExecutor(SESSIONS) as threads:
            return list(threads.map(stream, *zip(*self.parts, strict=True)))


@pytest.fixture(scope="module")
def wanted(models: Path) -> tuple[Work, list[list[np.ndarray]]]:
    """What a server that nobody disturbs answers, near eager PyTorch's answers."""
    work = Work(5)
    with serving(models) as server, cc.connect(server.address) as client:
        answers = work.run(client)
    for got, eager in zip(answers, work.eager(), strict=True):
        np.testing.assert_allclose(np.concatenate(got), eager, rtol=0, atol=1e-5)
    return work, answers


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path / 'sessions'}"
        return
    server = RedisServer(request.param, tmp_path, appendfsync="no")
    try:
        yield server.url
    finally:
        server.kill()


def armed(point: str, *counts: int) -> Callable[[], str]:
    """Each start dies at the next count, and one that finds none left lives."""
    left = iter([f"{point}:{count}" for count in counts])
    return lambda: next(left, "")


def differing(got: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> int:
    """Answers that are not those of the uninterrupted run, bit for bit."""
    return sum(
        [answer.tobytes() for answer in mine] != [answer.tobytes() for answer in theirs]
        for mine, theirs in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("store", ["sqlite", "redis"], indirect=True)
@pytest.mark.parametrize("point", ["before-run", "after-run", "after-commit", "after-answer"])
def test_killed_at_a_point_nothing_is_lost_or_doubled(models, store, point, wanted):
    """Killed before a run, after it, after its commit or after its answer, every session goes on as if nothing were."""
    work, answers = wanted
    with supervised(models, "--store", store, faults=armed(point, 3, 3)) as server:
        with cc.connect(server.address, resume_timeout=60) as client:
            got = work.run(client)
        assert server.deaths == 2
    assert differing(got, answers) == 0


def test_a_name_is_free_again_after_its_session_expired_in_the_store(models, tmp_path):
    """A session that expired while no server ran is told as expired, and another can be opened under its name."""
    settings = {"store": f"sqlite:{tmp_path / 'sessions'}", "idle_timeout_s": 0.3}
    x = np.zeros((8, 5), np.float32)
    with serving(models, **settings) as server, cc.connect(server.address, resume_timeout=0) as client:
        session = client.session("tagger", session_id="s")
        session.__enter__()
        first = session.send(x)
        server.kill()
    time.sleep(0.4)
    with serving(models, **settings) as server, cc.connect(server.address) as client:
        with pytest.raises(cc.SessionExpired), client.session("tagger", session_id="s", resume=True) as session:
            session.ready()
        with client.session("tagger", session_id="s") as session:
            np.testing.assert_array_equal(session.send(x), first)
