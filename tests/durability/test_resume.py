"""Exactly once between a client and a server that lives: connections cut everywhere, nothing lost, nothing doubled.

A real proxy stands between real clients and a real server process. Answers are compared bit for bit with those of an
uninterrupted run, and with eager PyTorch; the frames that the server's model ran are counted.
"""

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.client.process import serving
from tests.support.models import Speaker, Tagger, looked_ahead, make, whole
from tests.support.proxy import Cut, proxied

import carousel_client as cc

RNG = np.random.default_rng(17)
SESSIONS, CHUNKS = 6, 30


def frames_run(address: str) -> dict[str, int]:
    """What the server's models were run on so far, frames ahead included."""
    with cc.connect(address) as client:
        return {model: client.model(model).statistics.frames for model in ("tagger", "speaker")}


def ran_between(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {model: after[model] - before[model] for model in before}


class Work:
    """Sequences for several sessions, on both models, cut into chunks, and their answers."""

    def __init__(self, sessions: int, chunks: int) -> None:
        self.chunks: list[tuple[str, list[np.ndarray]]] = []
        for number in range(sessions):
            sizes = RNG.integers(1, 9, chunks)
            total = int(sizes.sum())
            model = "tagger" if number % 2 else "speaker"
            x = RNG.standard_normal((total, 5)).astype(np.float32) if number % 2 else RNG.integers(0, 11, total)
            self.chunks.append((model, np.split(x, np.cumsum(sizes)[:-1])))

    def eager(self) -> list[np.ndarray]:
        return [
            looked_ahead(make(Tagger), torch.from_numpy(np.concatenate(chunks)), 4, 2).numpy()
            if model == "tagger"
            else whole(make(Speaker), torch.from_numpy(np.concatenate(chunks))).numpy()
            for model, chunks in self.chunks
        ]

    def run(self, client: cc.Client) -> list[list[np.ndarray]]:
        def stream(model: str, chunks: list[np.ndarray]) -> list[np.ndarray]:
            with client.session(model) as session:
                return list(session.stream(chunks))

        with ThreadPoolExecutor(len(self.chunks)) as threads:
            return list(threads.map(stream, *zip(*self.chunks, strict=True)))

    async def run_aio(self, client: cc.aio.Client) -> list[list[np.ndarray]]:
        async def stream(model: str, chunks: list[np.ndarray]) -> list[np.ndarray]:
            async with client.session(model) as session:
                return [answer async for answer in session.stream(chunks)]

        return await asyncio.gather(*(stream(*one) for one in self.chunks))


def assert_same(got: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> None:
    """Bit for bit, answer by answer."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert [answer.tobytes() for answer in mine] == [answer.tobytes() for answer in theirs]


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with serving(models) as server:
        yield server.address


def random_cuts(seed: int, count: int) -> Iterator[Cut | None]:
    draw = random.Random(seed)
    for _ in range(count):
        yield Cut(draw.choice(["to server", "to client"]), int(10 ** draw.uniform(2.5, 4.5)), draw.random() < 0.5)
    while True:
        yield None


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_random_cuts_lose_and_double_nothing(address, kind):
    """Sixty cuts anywhere, with six sessions that have eight chunks in flight: the answers are those without a cut."""
    work = Work(SESSIONS, CHUNKS)
    begun = frames_run(address)
    with cc.connect(address) as client:
        wanted = work.run(client)
    without = frames_run(address)
    for answers, eager in zip(wanted, work.eager(), strict=True):
        np.testing.assert_allclose(np.concatenate(answers), eager, rtol=0, atol=1e-5)
    cuts = random_cuts(3, 60)
    rounds = 0
    with proxied(address, lambda: next(cuts)) as proxy:
        if kind == "blocking":
            with cc.connect(proxy.address) as client:
                client._connection._connected = True
                while proxy.cuts < 60:
                    assert_same(work.run(client), wanted)
                    rounds += 1
        else:
            async with cc.aio.connect(proxy.address) as client:
                client._connection._connected = True
                while proxy.cuts < 60:
                    assert_same(await work.run_aio(client), wanted)
                    rounds += 1
    once, all_rounds = ran_between(begun, without), ran_between(without, frames_run(address))
    assert all_rounds == {model: rounds * frames for model, frames in once.items()}
    with cc.connect(address) as client:
        assert all(client.model(model).statistics.open_sessions == 0 for model in ("tagger", "speaker"))


@pytest.mark.parametrize("direction", ["to server", "to client"])
def test_a_cut_at_every_point_loses_and_doubles_nothing(address, direction):
    """Wherever in its life a session is cut, from the handshake to Closed, its answers are those without a cut."""
    work = Work(2, 5)
    begun = frames_run(address)
    with cc.connect(address) as client:
        wanted = work.run(client)
    without = frames_run(address)
    rounds = 0
    with proxied(address) as proxy, cc.connect(proxy.address) as client:
        client.models()
        for after in range(0, 2400, 40):
            proxy.plan(Cut(direction, after, reset=after % 80 == 0))
            assert_same(work.run(client), wanted)
            rounds += 1
        assert proxy.cuts >= 20
    once, all_rounds = ran_between(begun, without), ran_between(without, frames_run(address))
    assert all_rounds == {model: rounds * frames for model, frames in once.items()}
