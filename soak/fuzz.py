"""A live server under requests that are wrong, and beside them sessions whose answers must not change by a bit."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import grpc
import numpy as np
from google.rpc.status_pb2 import Status
from soak.errors import SoakError
from soak.mutants import SERVICE, Mutants, Unary
from soak.processes import rss_mb
from soak.reference import Reference, references
from soak.work import draw
from tests.client.process import ServerProcess, serving

import carousel_client as cc
from carousel_protos.v1 import carousel_pb2 as pb

# Small bounds, so that whatever is bounded reaches its bound while the server warms up.
SETTINGS = {"max_sessions": 400, "idle_timeout_s": 5, "admin": "127.0.0.1:0"}
# Of 1,000 requests: unary calls, messages that may be none, and connections of noise. The others are items of streams.
UNARY, BROKEN, NOISE = 30, 20, 1
ITEMS, MESSAGES = 256, 8
CONTROL, CHUNKS = 7, 24
# Of the requests, how many the server warms up with; memory stays within this of what it was then.
WARM_UP, FLAT = 0.25, 0.05
# Fewer requests do not warm it up.
LEAST_JUDGED = 500_000
# Seconds that any answer may take.
PATIENCE_S = 60.0
# What no client is ever told: a fault of ours, or of nobody knows whose.
_FAULTS = {"INTERNAL", "UNKNOWN", "DATA_LOSS"}
_TRACE = re.compile(r"Traceback|\.py\b|File \"|\n")
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Fuzz:
    """What was found. `answers` counts the statuses, and OK, over all that was answered."""

    seed: int
    requests: int
    items: int = 0
    broken_messages: int = 0
    unary_calls: int = 0
    connections_of_noise: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    control_answers: int = 0
    control_differing: int = 0
    worst_eager_error: float = 0.0
    base_mb: float = 0.0
    highest_mb: float = 0.0
    seconds: float = 0.0
    # By the requests sent.
    rss_mb: list[tuple[int, float]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return self.items + self.broken_messages + self.unary_calls + self.connections_of_noise

    def thinned(self) -> list[tuple[int, float]]:
        """Some 60 samples of memory."""
        return self.rss_mb[:: max(1, len(self.rss_mb) // 60)]

    def judge(self) -> None:
        """Raise `SoakError` where an answer to the control sessions differs, or a client was told of a fault."""
        if self.control_differing or not self.control_answers:
            raise SoakError(f"{self.control_differing} of {self.control_answers} answers beside the fuzzing differ")
        if told := _FAULTS & self.answers.keys():
            raise SoakError(f"clients were told of faults: { {name: self.answers[name] for name in told} }")
        if self.sent < self.requests:
            raise SoakError(f"{self.sent} requests were sent, and {self.requests} were wanted")

    def judge_memory(self) -> None:
        """Raise `SoakError` where memory grew after the warm-up."""
        warm = [mb for sent, mb in self.rss_mb if sent >= self.requests * WARM_UP]
        self.base_mb, self.highest_mb = median(warm[: max(1, len(warm) // 5)]), max(warm)
        if self.highest_mb > self.base_mb * (1 + FLAT):
            raise SoakError(f"memory grew from {self.base_mb:.1f} to {self.highest_mb:.1f} MB after the warm-up")


class Attack:
    """Sends requests until there were as many as asked, and reads what is answered."""

    def __init__(self, server: ServerProcess, mutants: Mutants, fuzz: Fuzz) -> None:
        self._server = server
        self._mutants = mutants
        self._fuzz = fuzz
        self._answers: Counter[str] = Counter()
        self._addresses = re.findall(r"listening on (\S+)", "".join(server.log))

    async def run(self) -> None:
        fuzz = self._fuzz
        async with (
            grpc.aio.insecure_channel(self._addresses[0]) as channel,
            grpc.aio.insecure_channel(self._addresses[-1]) as admin,
        ):
            while fuzz.sent < fuzz.requests:
                await asyncio.gather(*(self._turn(channel, admin) for _ in range(4)))
                fuzz.rss_mb.append((fuzz.sent, round(rss_mb(self._server.pid), 2)))
        fuzz.answers = dict(self._answers)

    async def _turn(self, channel: grpc.aio.Channel, admin: grpc.aio.Channel) -> None:
        """A stream of items, and a share of everything else."""
        items = ITEMS * MESSAGES
        await self._stream(channel, self._mutants.messages(MESSAGES, ITEMS))
        self._fuzz.items += items
        for _ in range(items * BROKEN // 1000):
            await self._stream(channel, [self._mutants.broken()])
            self._fuzz.broken_messages += 1
        for _ in range(items * UNARY // 1000):
            call = self._mutants.unary()
            await self._call(admin if call.admin else channel, call)
            self._fuzz.unary_calls += 1
        for _ in range(items * NOISE // 1000):
            await self._noise()
            self._fuzz.connections_of_noise += 1

    async def _stream(self, channel: grpc.aio.Channel, messages: Sequence[bytes]) -> None:
        """Send messages, and read until the server has ended the stream."""
        call = channel.stream_stream(f"{SERVICE}Stream")(_each(messages), timeout=PATIENCE_S)
        try:
            async for raw in call:
                for item in pb.StreamResponse.FromString(raw).items:
                    self._note(item.failed.status if item.HasField("failed") else None)
        except grpc.aio.AioRpcError as error:
            self._note_rpc(error)

    async def _call(self, channel: grpc.aio.Channel, call: Unary) -> None:
        try:
            await channel.unary_unary(SERVICE + call.method)(call.request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            self._note_rpc(error)
        else:
            self._note(None)

    async def _noise(self) -> None:
        host, _, port = self._addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with suppress(ConnectionError):
            writer.write(self._mutants.noise())
            writer.write_eof()
            await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def _note(self, status: Status | None) -> None:
        if status is None:
            self._answers["OK"] += 1
            return
        self._answers[_CODES[status.code]] += 1
        self._check(status.message)

    def _note_rpc(self, error: grpc.aio.AioRpcError) -> None:
        if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
            raise SoakError(f"the server hangs, or has gone: {error.details()}")
        self._answers[error.code().name] += 1
        self._check(error.details() or "")

    def _check(self, told: str) -> None:
        if _TRACE.search(told):
            raise SoakError(f"a client was told of the server's inside: {told}")


async def _each(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for one in messages:
        yield one


class Control:
    """Sessions as they should be, over and over, until told to stop."""

    def __init__(self, found: Sequence[Reference], fuzz: Fuzz) -> None:
        self._found = found
        self._fuzz = fuzz
        self._over = False

    def stop(self) -> None:
        self._over = True

    async def run(self, target: str) -> None:
        async with cc.aio.connect(target) as client:
            await asyncio.gather(*(self._repeat(client, reference) for reference in self._found))

    async def _repeat(self, client: cc.aio.Client, reference: Reference) -> None:
        work = reference.work
        while True:
            try:
                async with client.session(work.model, policy=work.policy) as session:
                    answers = [np.asarray(answer) async for answer in session.stream(list(work.chunks))]
            except cc.ResourceExhausted:  # the sessions of the fuzzing fill the server: it says when there is room
                await asyncio.sleep(0.2)
                continue
            self._fuzz.control_answers += len(answers)
            self._fuzz.control_differing += reference.differing(answers)
            if self._over:
                return


async def _states(target: str, found: Sequence[Reference]) -> list[bytes]:
    """States of sessions in the middle of their chunks, to be forged."""
    states = []
    async with cc.aio.connect(target) as client:
        for reference in found:
            async with client.session(reference.work.model, policy=reference.work.policy) as session:
                for chunk in reference.work.chunks[:3]:
                    await session.send(chunk)
                states.append(await client.get_state(session.id))
    return states


async def attack(server: ServerProcess, fuzz: Fuzz) -> None:
    """Fuzz a server that serves the soak's models; what comes of it is in `fuzz`. Raises `SoakError`."""
    found, fuzz.worst_eager_error = await references(server.address, draw(CONTROL, CHUNKS, fuzz.seed))
    mutants = Mutants(fuzz.seed, await _states(server.address, found))
    began = time.monotonic()
    control = Control(found, fuzz)
    beside = asyncio.create_task(control.run(server.address))
    attacking = asyncio.create_task(Attack(server, mutants, fuzz).run())
    # Whichever fails ends both.
    await asyncio.wait({beside, attacking}, return_when=asyncio.FIRST_COMPLETED)
    if not attacking.done():
        attacking.cancel()
    control.stop()
    await asyncio.gather(attacking, beside)
    fuzz.seconds = round(time.monotonic() - began, 1)


def soak(models: Path, *, requests: int, seed: int) -> Fuzz:
    """Send `requests`, and make sure that the server's log has no traceback. Raises `SoakError`."""
    fuzz = Fuzz(seed, requests)
    with serving(models, **SETTINGS) as server:
        asyncio.run(attack(server, fuzz))
        pid = server.pid
        if (code := server.stop()) != 0:
            raise SoakError(f"the server, process {pid}, ended with {code}")
    if "Traceback" in (log := "".join(server.log)):
        raise SoakError(f"the server's log has a traceback: {log[log.index('Traceback') - 300 :][:3000]}")
    return fuzz
