"""A supervised server that is killed again and again under live sessions; what was lost and what was doubled."""

import asyncio
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from soak.errors import SoakError
from soak.models import MARKS
from soak.reference import Reference, references
from soak.work import Array, draw
from tests.client.process import serving
from tests.support.redis_server import RedisServer
from tests.support.supervised import Supervised, supervised

import carousel_client as cc
from carousel_server.faults import Point

ANY_MOMENT = "any moment"
# Of the kills, how many are at an armed point.
ARMED = 0.6
# Passes of a point, and seconds after a start, within which the kill is drawn; and those after which it comes anyway.
PASSES, MOMENT_S, PATIENCE_S = 30, 2.5, 15.0
# Seconds between two chunks of a session, at most; chunks under way.
PAUSE_S, IN_FLIGHT = 0.6, 4
# Of the sessions, how many go through the blocking client.
BLOCKING = 0.2
RESUME_TIMEOUT_S = 120.0


@dataclass
class Kills:
    """What was found. `at` counts what the kills were armed for; `lost` and `doubled` are chunks."""

    store: str
    seed: int
    live_sessions: int
    worst_eager_error: float
    kills: int = 0
    at: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    chunks: int = 0
    counted_chunks: int = 0
    resumes: int = 0
    lost: int = 0
    doubled: int = 0
    differing: int = 0
    seconds: float = 0.0

    def judge(self, wanted: int) -> None:
        """Raise `SoakError` where anything was lost, doubled or different, or the kills were fewer than asked."""
        if self.lost or self.doubled or self.differing:
            raise SoakError(
                f"{self.store}: {self.lost} chunks lost, {self.doubled} doubled, {self.differing} answers that differ"
            )
        if self.kills < wanted:
            raise SoakError(f"{self.store}: {self.kills} kills, and {wanted} were wanted")


class Doom:
    """What each start of the server dies of: a point that its environment arms, or a moment."""

    def __init__(self, wanted: int, seed: int) -> None:
        self.at: Counter[str] = Counter()
        self._wanted = wanted
        self._random = random.Random(seed)
        self._server: Supervised | None = None
        self._timer = threading.Timer(0, lambda: None)

    def begin(self, server: Supervised) -> None:
        """The server is up: the first kill is now."""
        self._server = server
        self.at[ANY_MOMENT] += 1
        server.kill()

    def arm(self) -> str:
        """For the environment of the next start."""
        self._timer.cancel()
        if self._server is None or self._server.deaths >= self._wanted:
            return ""
        moment, fault = PATIENCE_S, ""
        if self._random.random() < ARMED:
            point = self._random.choice(get_args(Point))
            fault = f"{point}:{self._random.randint(1, PASSES)}"
            self.at[point] += 1
        else:
            moment = self._random.uniform(0, MOMENT_S)
            self.at[ANY_MOMENT] += 1
        self._timer = threading.Timer(moment, self._end, (self._server, self._server.deaths))
        self._timer.start()
        return fault

    @staticmethod
    def _end(server: Supervised, deaths: int) -> None:
        """Kill it, also where its process is only being started."""
        while server.deaths == deaths:
            server.kill()
            time.sleep(0.05)


class Sessions:
    """Streams sequences, one after the other, as many at once as asked, until the kills are done."""

    def __init__(self, found: Sequence[Reference], more: Callable[[], bool], kills: Kills) -> None:
        self._found = found
        self._more = more
        self._kills = kills

    async def run(self, target: str) -> None:
        blocking = int(len(self._found) * BLOCKING)
        loop = asyncio.get_running_loop()
        with (
            cc.connect(target, resume_timeout=RESUME_TIMEOUT_S) as client,
            ThreadPoolExecutor(max(1, blocking)) as threads,
        ):
            async with cc.aio.connect(target, resume_timeout=RESUME_TIMEOUT_S) as asynchronous:
                await asyncio.gather(
                    *(loop.run_in_executor(threads, self._block, client, one) for one in self._found[:blocking]),
                    *(self._stream(asynchronous, one) for one in self._found[blocking:]),
                )

    async def _stream(self, client: cc.aio.Client, reference: Reference) -> None:
        async def chunks() -> AsyncIterator[Array]:
            for chunk in work.chunks:
                await asyncio.sleep(random.uniform(0, PAUSE_S))
                yield chunk

        work = reference.work
        while self._more():
            async with client.session(work.model, policy=work.policy) as session:
                answers = [np.asarray(answer) async for answer in session.stream(chunks(), in_flight=IN_FLIGHT)]
                opened = session._state.opened
            self._count(reference, answers, opened.epoch if opened is not None else 0)

    def _block(self, client: cc.Client, reference: Reference) -> None:
        def chunks() -> Iterator[Array]:
            for chunk in work.chunks:
                time.sleep(random.uniform(0, PAUSE_S))
                yield chunk

        work = reference.work
        while self._more():
            with client.session(work.model, policy=work.policy) as session:
                answers = [np.asarray(answer) for answer in session.stream(chunks(), in_flight=IN_FLIGHT)]
                opened = session._state.opened
            self._count(reference, answers, opened.epoch if opened is not None else 0)

    def _count(self, reference: Reference, answers: Sequence[Array], epoch: int) -> None:
        kills, work = self._kills, reference.work
        kills.sequences += 1
        kills.chunks += len(work.chunks)
        kills.resumes += epoch - 1
        kills.differing += reference.differing(answers)
        if work.model == "tally":
            lost, doubled = work.miscounted(answers)
            kills.counted_chunks += len(work.chunks)
            kills.lost += lost
            kills.doubled += doubled


@contextmanager
def _store(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:{folder / 'sessions'}"
        return
    # Only Carousel is killed: what redis was told need not reach the disk.
    server = RedisServer(kind, folder, appendfsync="no")
    try:
        yield server.url
    finally:
        server.kill()


async def _drive(server: Supervised, found: Sequence[Reference], wanted: int, doom: Doom, kills: Kills) -> None:
    async def say() -> None:
        while True:
            await asyncio.sleep(20)
            print(f"  {server.deaths} kills, {kills.sequences} sequences, {kills.differing} differ", flush=True)

    saying = asyncio.create_task(say())
    running = asyncio.create_task(Sessions(found, lambda: server.deaths < wanted, kills).run(server.address))
    await asyncio.sleep(1)
    doom.begin(server)
    await running
    saying.cancel()


def soak(models: Path, kind: str, *, wanted: int, live: int, seed: int) -> Kills:
    """Kill a server `wanted` times under `live` sessions that are kept in a store of this kind.

    Raises `SoakError` where the server's log has a traceback, or an undisturbed server is not near eager PyTorch.
    """
    works = draw(live, MARKS, seed)
    with serving(models) as undisturbed:
        found, worst = asyncio.run(references(undisturbed.address, works))
    kills, doom = Kills(kind, seed, live, worst), Doom(wanted, seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, _store(kind, Path(name)) as store:
        log = Path(name) / "log"
        with supervised(models, "--threads", "1", "--store", store, faults=doom.arm, log=log) as server:
            asyncio.run(_drive(server, found, wanted, doom, kills))
            kills.kills, kills.at = server.deaths, dict(doom.at)
        if "Traceback" in (said := log.read_text(encoding="utf-8")):
            raise SoakError(f"the server's log has a traceback: {said[-2000:]}")
    kills.seconds = round(time.monotonic() - began, 1)
    return kills
