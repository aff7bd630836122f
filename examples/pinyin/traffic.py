"""Many people typing at once: every sentence a session, its characters in chunks of random size."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import carousel_client as cc
import carousel_client.aio as carousel
from carousel_protos.v1.carousel_pb2 import Statistics

LARGEST_CHUNK = 6

Probabilities = NDArray[np.float32]  # [characters and marks, readings]


@dataclass(frozen=True)
class Run:
    """What came back under one policy, and how it went."""

    answers: list[Probabilities]  # one a sentence
    latencies_s: list[float]  # one a chunk: sent to answered
    seconds: float
    sessions: int  # the most that were open at once
    steps: int
    rows: int

    @property
    def characters(self) -> int:
        """Characters answered, without the two marks around each sentence."""
        return sum(len(answer) - 2 for answer in self.answers)


async def stream_all(
    client: carousel.Client, model: str, sequences: Sequence[NDArray[np.int64]], policy: cc.Policy | None, at_once: int
) -> Run:
    """Stream all `sequences`, int64 `[characters]`, each in a session of its own, `at_once` of them open together.

    Raises `CarouselError` for the first that fails.
    """
    room = asyncio.Semaphore(at_once)
    latencies: list[float] = []
    running = most = 0

    async def stream(index: int, characters: NDArray[np.int64]) -> Probabilities:
        nonlocal running, most
        answers = []
        async with room, client.session(model, policy=policy) as session:
            running += 1
            most = max(most, running)
            chunks = cut(characters, random.Random(index))
            for i, chunk in enumerate(chunks):
                sent = time.perf_counter()
                answers.append(await session.send(chunk, end=i == len(chunks) - 1))
                latencies.append(time.perf_counter() - sent)
            running -= 1
        return np.concatenate(answers)

    before = await _statistics(client, model)
    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream(i, characters)) for i, characters in enumerate(sequences)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # the first that failed says why; the others were cancelled
    seconds = time.perf_counter() - started
    after = await _statistics(client, model)
    answers = [task.result() for task in tasks]
    return Run(answers, latencies, seconds, most, after.steps - before.steps, after.rows - before.rows)


def cut(characters: NDArray[np.int64], draw: random.Random) -> list[NDArray[np.int64]]:
    """The sequence in chunks of one to six characters."""
    chunks, start = [], 0
    while start < len(characters):
        end = start + draw.randint(1, LARGEST_CHUNK)
        chunks.append(characters[start:end])
        start = end
    return chunks


async def _statistics(client: carousel.Client, model: str) -> Statistics:
    return (await client.model(model)).statistics
