"""Closed loop: each session waits for its answer. Open loop: chunks arrive when they arrive."""

import asyncio
import random
import sys
import threading
import time
from collections.abc import Sequence

from bench.client.record import Record
from bench.client.wires import Session

# Chunks of a session that wait for their answers; a server may refuse more. The others wait here, and their clock runs.
_IN_FLIGHT = 32


async def closed_loop(session: Session, number: int, record: Record) -> None:
    """One session, until the record is over."""
    index = 0
    while not record.over:
        sent = time.perf_counter()
        await session.send(index)
        record.done(number, index, sent, await session.receive())
        index += 1


async def open_loop(sessions: Sequence[Session], rate: float, record: Record) -> None:
    """Poisson arrivals, `rate` a second in all, each for a session drawn at random; latency counts from the arrival.

    A session sends without waiting for what it sent before, unless very much of it was not answered.
    """
    loop = asyncio.get_running_loop()
    queues: list[asyncio.Queue[float | None]] = [asyncio.Queue() for _ in sessions]

    def arrive(number: int, moment: float) -> None:
        queues[number].put_nowait(moment)

    def clock() -> None:
        # A thread, since the event loop's own timers are a millisecond coarse.
        draw, moment = random.Random(0), time.perf_counter()
        while not record.over:
            moment += draw.expovariate(rate)
            time.sleep(max(0.0, moment - time.perf_counter()))
            loop.call_soon_threadsafe(arrive, draw.randrange(len(sessions)), moment)

    # The clock must not wait five milliseconds for its turn.
    sys.setswitchinterval(0.0005)
    ticking = threading.Thread(target=clock)
    async with asyncio.TaskGroup() as tasks:
        for number, session in enumerate(sessions):
            tasks.create_task(_both_ways(session, number, queues[number], record))
        ticking.start()
        await asyncio.to_thread(ticking.join)
        for queue in queues:
            queue.put_nowait(None)


async def _both_ways(session: Session, number: int, queue: asyncio.Queue[float | None], record: Record) -> None:
    sent: asyncio.Queue[float | None] = asyncio.Queue(_IN_FLIGHT)

    async def receive() -> None:
        index = 0
        while (moment := await sent.get()) is not None:
            record.done(number, index, moment, await session.receive())
            index += 1

    receiving = asyncio.create_task(receive())
    index = 0
    while (moment := await queue.get()) is not None:
        await sent.put(moment)
        await session.send(index)
        index += 1
    await sent.put(None)
    await receiving
