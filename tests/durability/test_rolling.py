"""Two servers behind HAProxy share a redis, and are restarted one after the other while 200 sessions stream.

HAProxy runs the configuration that is shipped, the servers are processes that get signals, the redis is one of its own.
A third of the sessions is on a model that counts its frames: a chunk that was lost or run twice shows as a number. All
answers are compared, bit for bit, with those of a server that nobody disturbs, and with eager PyTorch.
"""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import ServerProcess, serving
from tests.support.haproxy import Haproxy, free_ports, haproxy
from tests.support.models import Speaker, Tagger, looked_ahead, make, whole
from tests.support.redis_server import RedisServer
from tests.support.shared import make_once
from torch import nn

import carousel_client as cc
import carousel_export as cx

CLIENTS, SESSIONS = 25, 200
# Seconds between two chunks of a session.
PACE = 0.2
KINDS = ("counter", "speaker", "tagger")


class Counter(nn.Module):
    """Ones `[batch, time, 1]` → `[batch, time, 1]`: how many there were so far, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 2, nonlinearity="relu", bias=False, batch_first=True)
        with torch.no_grad():
            self.rnn.weight_ih_l0.copy_(torch.ones(2, 1))
            self.rnn.weight_hh_l0.copy_(torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0][..., :1]


@pytest.fixture(scope="session")
def counted_models(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A models folder with `counter`, `speaker` and `tagger`."""

    def export(folder: Path) -> None:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        cx.export(make(Counter), torch.ones(3, 6, 1), name="counter", out=folder)

    return make_once(tmp_path_factory, "counted", export)


@dataclass
class Talk:
    """What one session sent, and what it was answered."""

    number: int
    chunks: list[np.ndarray] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)

    @property
    def model(self) -> str:
        return KINDS[self.number % len(KINDS)]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        size = int(rng.integers(1, 9))
        match self.model:
            case "counter":
                return np.ones((size, 1), np.float32)
            case "speaker":
                return rng.integers(0, 11, size)
            case _:
                return rng.standard_normal((size, 5)).astype(np.float32)

    async def live(self, client: cc.aio.Client, over: asyncio.Event) -> None:
        """Send a chunk now and then until it is `over`, whether the one before was answered or not."""
        rng = np.random.default_rng(self.number)

        async def chunks() -> AsyncIterator[np.ndarray]:
            while not over.is_set():
                await asyncio.sleep(PACE * rng.uniform(0.5, 1.5))
                self.chunks.append(self.draw(rng))
                yield self.chunks[-1]

        async with client.session(self.model, session_id=f"call-{self.number}") as session:
            self.answers = [answer async for answer in session.stream(chunks())]

    async def again(self, client: cc.aio.Client) -> list[np.ndarray]:
        """What a server answers that nobody disturbs."""
        async with client.session(self.model) as session:
            return [answer async for answer in session.stream(self.chunks)]

    def eager(self) -> np.ndarray:
        x = np.concatenate(self.chunks)
        match self.model:
            case "counter":
                return np.arange(1, len(x) + 1, dtype=np.float32)[:, None]
            case "speaker":
                return whole(make(Speaker), torch.from_numpy(x)).numpy()
            case _:
                return looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2).numpy()

    def miscounted(self) -> list[float]:
        """By how many frames each answer of `counter` is off what was sent: less than zero were lost, more doubled."""
        sent = np.cumsum([len(chunk) for chunk in self.chunks])
        return [float(answer[-1, 0]) - count for answer, count in zip(self.answers, sent, strict=False)]


class Replicas:
    """Two servers on one redis, which come back on their ports."""

    def __init__(self, models: Path, store: str, cleanup: ExitStack) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self._models, self._store = models, store
        self._servers = [self._start(address) for address in self.addresses]
        cleanup.callback(self.stop)
        for server in self._servers:
            server.wait_until_served()

    def _start(self, address: str) -> ServerProcess:
        return ServerProcess(self._models, listen=address, store=self._store, drain_timeout_s=10)

    def restart(self, which: int, how: signal.Signals) -> int:
        """End one, start it again and wait until it serves; the exit code."""
        server = self._servers[which]
        code = server.end(how)
        self._servers[which] = self._start(self.addresses[which])
        self._servers[which].wait_until_served()
        return code

    def stop(self) -> None:
        for server in self._servers:
            server.stop()

    async def held(self) -> list[set[str]]:
        """The sessions that streams hold on each."""
        found = []
        for address in self.addresses:
            async with cc.aio.connect(address) as client:
                found.append({session.session_id for session in await client.sessions() if session.attached})
        return found


@pytest.fixture
def replicas(counted_models: Path, tmp_path: Path) -> Iterator[tuple[Replicas, Haproxy]]:
    """Two servers, and the proxy before them."""
    with ExitStack() as cleanup:
        redis = RedisServer("redis", tmp_path, appendfsync="no")
        cleanup.callback(redis.kill)
        pair = Replicas(counted_models, redis.url, cleanup)
        yield pair, cleanup.enter_context(haproxy(pair.addresses, tmp_path))


@pytest.mark.parametrize("ends", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGKILL,)], ids=["rolling", "killed"])
async def test_sessions_outlive_the_servers_behind_a_proxy(counted_models, replicas, ends, capsys):
    """Both servers restarted by SIGTERM in turn, or one killed: 200 live sessions lose nothing and double nothing."""
    pair, proxy = replicas
    talks = [Talk(number) for number in range(SESSIONS)]
    over = asyncio.Event()
    async with AsyncExitStack() as clients:
        connected = [await clients.enter_async_context(cc.aio.connect(proxy.address)) for _ in range(CLIENTS)]
        async with asyncio.TaskGroup() as tasks:
            for talk in talks:
                tasks.create_task(talk.live(connected[talk.number % CLIENTS], over))
            await asyncio.sleep(1)
            before = [len(sessions) for sessions in await pair.held()]
            codes = [await asyncio.to_thread(pair.restart, which, how) for which, how in enumerate(ends)]
            await asyncio.sleep(1)
            over.set()
    with serving(counted_models) as undisturbed:
        async with cc.aio.connect(undisturbed.address) as client:
            wanted = await asyncio.gather(*(talk.again(client) for talk in talks))

    off = [count for talk in talks if talk.model == "counter" for count in talk.miscounted()]
    lost, doubled = sum(count < 0 for count in off), sum(count > 0 for count in off)
    sent, answered = sum(len(talk.chunks) for talk in talks), sum(len(talk.answers) - 1 for talk in talks)
    differing = sum(
        [answer.tobytes() for answer in talk.answers] != [answer.tobytes() for answer in theirs]
        for talk, theirs in zip(talks, wanted, strict=True)
    )
    with capsys.disabled():
        print(  # noqa: T201 -- the count is what this is for
            f"\n{SESSIONS} sessions on {CLIENTS} streams, {before[0]} + {before[1]}; servers ended with {codes}; "
            f"chunks: {sent} sent, {answered} answered, {lost} lost, {doubled} doubled; {differing} sessions differ"
        )
    assert (answered, lost, doubled, differing) == (sent, 0, 0, 0)
    assert codes == [0 if how == signal.SIGTERM else -how for how in ends]
    assert all(before)
    for talk in talks:
        np.testing.assert_allclose(np.concatenate(talk.answers), talk.eager(), rtol=0, atol=1e-5)


async def test_a_session_finds_its_server_and_another_where_that_one_does_not_serve(replicas):
    """Clients that take a session up one after the other reach one server, until health says that it serves nothing."""
    pair, proxy = replicas
    names = [f"session {number} \N{LATIN SMALL LETTER E WITH ACUTE}" for number in range(8)]

    places = []
    for index in range(3):
        async with AsyncExitStack() as clients:
            for name in names:  # each on a stream of its own
                client = await clients.enter_async_context(cc.aio.connect(proxy.address))
                session = await client.session("counter", session_id=name, resume=index > 0).__aenter__()
                await session.send(np.ones((1, 1), np.float32))
            places.append(await pair.held())
    first, second = places[0]
    assert places == [[first, second]] * 3
    assert first | second == set(names)
    assert len(first) + len(second) == len(names)
    assert first
    assert second

    async with cc.aio.connect(pair.addresses[0]) as client:
        for name in first:
            await client.drop(name)
        for kind in KINDS:
            await client.unload(kind)
    await asyncio.to_thread(proxy.wait_for, "replicas/a is DOWN, reason: Layer7 invalid response")
    async with cc.aio.connect(proxy.address) as client, client.session("counter", session_id=min(first)) as late:
        await late.send(np.ones((1, 1), np.float32))
        assert await pair.held() == [set(), {late.id}]
