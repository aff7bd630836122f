"""Any story of open, chunk, retry, cancel, close, expire, fork and crash, on real engines, beside a short reference.

What the reference knows of a session is what was sent and answered; what must be answered, eager PyTorch says.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from tests.support.models import Speaker, make, whole

from carousel_server.config import ServerConfig
from carousel_server.engine.asked import Asked
from carousel_server.engine.engine import Engine
from carousel_server.engine.events import Closed, Event, Failure, Result, Taken
from carousel_server.engine.portable import unseal
from carousel_server.errors import (
    AlreadyExistsError,
    CarouselError,
    FencedError,
    IndexGapError,
    SessionClosedError,
    SessionExpiredError,
    SessionNotFoundError,
)

MODEL = make(Speaker)
LATER = 1e6
NAMES = st.sampled_from("ab")
TOKENS = st.lists(st.integers(0, 10), min_size=1, max_size=4)


class Stream:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self._came = asyncio.Event()

    def deliver(self, event: Event) -> None:
        self.events.append(event)
        self._came.set()

    async def next(self) -> Event:
        async with asyncio.timeout(10):
            while not self.events:
                self._came.clear()
                await self._came.wait()
        return self.events.pop(0)


@dataclass
class Known:
    """The reference: a session is the chunks that were answered, and the one that was sent and is not."""

    name: str
    holder: str
    epoch: int
    stream: Stream | None
    chunks: list[list[int]] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    waiting: list[int] | None = None
    # Answers to the chunks before this one are not asked for again.
    acknowledged: int = 0
    gone: type[CarouselError] | None = None
    # It was closed with answers that can be had for a while.
    late: bool = False

    def wanted(self, index: int) -> np.ndarray:
        tokens = [token for chunk in self.chunks[: index + 1] for token in chunk]
        return whole(MODEL, torch.tensor(tokens)).numpy()[len(tokens) - len(self.chunks[index]) :]


class Story(RuleBasedStateMachine):
    """One client of one server, whose process may end at any moment; streams break as they like."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__()
        self.config = config
        self.runner = asyncio.Runner()
        self.known: dict[str, Known] = {}
        self.durable = config.store != "memory"
        self.run(self.begin())

    def run(self, story):
        return self.runner.run(story)

    async def begin(self) -> None:
        self.engine = Engine(self.config)
        await self.engine.start()

    async def end(self) -> None:
        """As SIGKILL would: nothing is written any more."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for entry in self.engine.catalogue.entries():
            await asyncio.to_thread(entry.model.steps.shut)
        if self.engine.keeper is not None:
            await self.engine.keeper.store.close()

    # What the client does

    async def open(self, stream: Stream, name: str, holder: str, *, resume: bool, epoch: int | None = None) -> Taken:
        asked = {"session_id": name, "model": "speaker", "resume": resume, "holder": holder, "epoch": epoch}
        await self.engine.bring(Asked(**asked))
        given = {"version": "", "policy": None, "initial_state": {}, "context": {}, "acknowledged": 0}
        if resume and (known := self.known.get(name)) is not None:
            given["acknowledged"] = known.acknowledged
        session, _ = self.engine.open(stream, **asked, **given)
        session.taken()
        while not isinstance(taken := await stream.next(), Taken):
            assert isinstance(taken, Failure), "nothing is answered on a stream before it has the session"
        return taken

    async def ask(self, stream: Stream, call: Callable[[], object], name: str) -> object:
        """As a stream does, which has a cold session fetched."""
        try:
            return call()
        except CarouselError:
            if not self.engine.is_cold(stream, name):
                raise
        await self.engine.bring_held(stream, name)
        return call()

    async def attach(self, known: Known) -> None:
        """The stream has broken: another takes the session up, and sends what was not answered again."""
        if known.stream is not None:
            return
        stream = Stream()
        taken = await self.open(stream, known.name, known.holder, resume=True, epoch=known.epoch)
        known.stream, known.epoch = stream, taken.epoch
        assert taken.next_index in {len(known.chunks), len(known.chunks) + (known.waiting is not None)}
        if known.waiting is not None:
            await self.send(known, len(known.chunks), known.waiting)

    async def send(self, known: Known, index: int, tokens: list[int]) -> None:
        stream, x = known.stream, {"tokens": np.array(tokens)}
        acknowledged = known.acknowledged

        def submit() -> None:
            self.engine.submit(stream, known.name, index, x, end=False, acknowledged=acknowledged)

        await self.ask(stream, submit, known.name)

    async def settle(self, known: Known) -> None:
        """Have the answer to what waits."""
        await self.attach(known)
        if known.waiting is not None:
            result = await known.stream.next()
            assert isinstance(result, Result), result
            assert result.index == len(known.chunks)
            known.chunks.append(known.waiting)
            known.waiting = None
            (data,) = result.data
            known.answers.append(data)
            got = np.frombuffer(data, np.float32).reshape(-1, 11)
            np.testing.assert_allclose(got, known.wanted(result.index), rtol=0, atol=1e-5)

    def live(self, name: str) -> Known | None:
        known = self.known.get(name)
        return known if known is not None and known.gone is None else None

    def session(self, name: str) -> Known:
        """A live one, opened where there is none."""
        if (known := self.live(name)) is None:
            stream, holder = Stream(), uuid4().hex
            taken = self.run(self.open(stream, name, holder, resume=False))
            assert taken.next_index == 0
            known = self.known[name] = Known(name, holder, taken.epoch, stream)
        return known

    # The story

    @rule(name=NAMES)
    def open_twice(self, name: str) -> None:
        self.session(name)
        with pytest.raises(AlreadyExistsError):
            self.run(self.open(Stream(), name, uuid4().hex, resume=False))

    @rule(name=NAMES, chunks=st.lists(TOKENS, min_size=1, max_size=3), acknowledge=st.booleans(), wait=st.booleans())
    def chunk(self, name: str, chunks: list[list[int]], acknowledge: bool, wait: bool) -> None:
        known = self.session(name)

        async def go() -> None:
            for tokens in chunks:
                await self.settle(known)
                if acknowledge:
                    known.acknowledged = len(known.chunks)
                known.waiting = tokens
                await self.send(known, len(known.chunks), tokens)
            if wait:
                await self.settle(known)

        self.run(go())

    @rule(name=NAMES, back=st.integers(0, 3))
    def retry(self, name: str, back: int) -> None:
        known = self.session(name)

        async def go() -> None:
            await self.settle(known)
            index = len(known.chunks) - 1 - back
            if not known.acknowledged <= index:
                with pytest.raises(IndexGapError):
                    await self.send(known, len(known.chunks) + 1 + back, [1])
                return
            await self.send(known, index, [])
            result = await known.stream.next()
            assert (result.index, result.data) == (index, (known.answers[index],))

        self.run(go())

    @rule(name=NAMES, turns=st.integers(0, 6))
    def cancel(self, name: str, turns: int) -> None:
        known = self.session(name)
        if known.stream is None:
            return

        async def go() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            self.engine.detach(known.stream)

        self.run(go())
        known.stream = None

    @rule(name=NAMES)
    def take_over(self, name: str) -> None:
        """Another stream resumes; the one before is told, and cannot take it back."""
        known = self.session(name)

        async def go() -> None:
            await self.settle(known)
            older, holder, epoch = known.stream, known.holder, known.epoch
            known.stream, known.holder = Stream(), uuid4().hex
            known.epoch = (await self.open(known.stream, name, known.holder, resume=True)).epoch
            told = await older.next()
            assert isinstance(told.error, FencedError)
            with pytest.raises(FencedError):
                await self.open(Stream(), name, holder, resume=True, epoch=epoch)

        self.run(go())

    @rule(name=NAMES, told=st.booleans())
    def close(self, name: str, told: bool) -> None:
        """A close whose answer is lost is sent again on another stream, where the last answers are still to be had."""
        known = self.session(name)

        async def close() -> None:
            def ask() -> bool:
                return self.engine.close(known.stream, name, acknowledged=known.acknowledged)

            if not await self.ask(known.stream, ask, name):
                assert isinstance(await known.stream.next(), Closed)

        async def go() -> None:
            await self.settle(known)
            await close()
            known.gone, known.late = SessionClosedError, known.acknowledged < len(known.chunks)
            if told:
                return
            self.engine.detach(known.stream)
            known.stream = None
            try:
                await self.attach(known)
            except SessionClosedError:
                assert not known.late
                return
            for index in range(known.acknowledged, len(known.chunks)):
                await self.send(known, index, [])
                result = await known.stream.next()
                assert (result.index, result.data) == (index, (known.answers[index],))
            with pytest.raises(SessionClosedError):
                await self.send(known, len(known.chunks), [1])
            known.acknowledged = len(known.chunks)
            await close()

        self.run(go())

    @rule()
    def expire(self) -> None:
        async def go() -> None:
            for known in self.known.values():
                if known.gone is None:
                    await self.settle(known)
            here = [name for name in self.known if self.engine.sessions.peek(name) is not None]
            self.engine.sessions.expire(time.monotonic() + LATER)
            for name in here:
                told = await self.known[name].stream.next()
                assert isinstance(told.error, SessionExpiredError)
                self.known[name].gone = SessionExpiredError
                if self.engine.keeper is not None:  # its record would have expired too, had the time really passed
                    await self.engine.keeper.ended(name)

        self.run(go())

    @rule()
    def leave_memory(self) -> None:
        if not self.durable:
            return

        async def go() -> None:
            for known in self.known.values():
                if known.gone is None:
                    await self.settle(known)
            for _ in range(1000):
                if not len(self.engine.sessions):
                    return
                await self.engine.cold.room.sweep(time.monotonic() + LATER)
                await asyncio.sleep(0.001)
            raise AssertionError("sessions stay in memory")

        self.run(go())

    @rule(name=NAMES, new=NAMES)
    def fork(self, name: str, new: str) -> None:
        known = self.session(name)

        async def go() -> None:
            await self.settle(known)
            if self.live(new) is not None:
                with pytest.raises(AlreadyExistsError):
                    await self.engine.fork(name, new)
                return
            view = await self.engine.fork(name, new)
            assert view.next_index == len(known.chunks)
            branch = Known(new, uuid4().hex, 0, Stream(), list(known.chunks), list(known.answers))
            branch.acknowledged = max(0, len(known.chunks) - 1)
            self.known[new] = branch
            taken = await self.open(branch.stream, new, branch.holder, resume=True)
            branch.epoch = taken.epoch
            assert taken.next_index == len(known.chunks)

        self.run(go())

    @rule(name=NAMES)
    def gone(self, name: str) -> None:
        """A late word to a session that is no more is told how it went."""
        known = self.known.get(name)
        if known is not None and known.gone is not None and not known.late:
            with pytest.raises(known.gone):
                self.run(self.open(Stream(), name, known.holder, resume=True, epoch=known.epoch))

    @rule(most=st.integers(1, 4))
    def look(self, most: int) -> None:
        """Lists and states say of every session, in memory or not, what was answered."""

        async def go() -> None:
            live = {name: known for name, known in sorted(self.known.items()) if known.gone is None}
            for known in live.values():
                await self.settle(known)
                state = unseal(await self.engine.get_state(known.name))
                assert state.next_index == len(known.chunks)
            found, after = [], ""
            while page := await self.engine.list_sessions(model="", after=after, most=most):
                found += page
                after = page[-1].session_id
            assert [(view.session_id, view.next_index) for view in found] == [
                (name, len(known.chunks)) for name, known in live.items()
            ]

        self.run(go())

    @rule(turns=st.integers(0, 8))
    def crash(self, turns: int) -> None:
        async def go() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await self.end()
            await self.begin()
            for name, known in list(self.known.items()):
                known.stream = None
                if not self.durable:
                    with pytest.raises(SessionNotFoundError):
                        await self.open(Stream(), name, known.holder, resume=True, epoch=known.epoch)
                    del self.known[name]
                elif known.gone is None and not known.chunks:
                    # As long as nothing was answered, whoever opened it opens it again as it was.
                    known.stream = Stream()
                    known.epoch = (await self.open(known.stream, name, known.holder, resume=False)).epoch
                    if known.waiting is not None:
                        await self.send(known, 0, known.waiting)

        self.run(go())

    def teardown(self) -> None:
        self.run(self.end())
        self.runner.close()


@pytest.fixture
def begin(models: Path, tmp_path: Path) -> Callable[[str], Story]:
    """A story on a store of its own."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "speaker").symlink_to(models / "speaker")

    def make_story(store: str) -> Story:
        spec = store if store == "memory" else f"sqlite:{tmp_path / uuid4().hex}?synchronous=normal"
        return Story(ServerConfig(models=folder, store=spec, threads=1))

    return make_story


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_any_story_of_sessions(begin: Callable[[str], Story], store: str) -> None:
    """Whatever clients do and whenever the process ends, each answer is eager PyTorch's, and the same again."""
    story = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: begin(store), settings=story)


def test_last_answers_after_a_close_and_a_crash(begin: Callable[[str], Story]) -> None:
    """A session that was closed gives its last answers again, after a crash and out of memory too, and no other's."""
    story = begin("sqlite")
    for name in "ab":
        story.chunk(name=name, chunks=[[1, 2], [3]], acknowledge=False, wait=True)
    story.crash(turns=0)
    story.leave_memory()
    story.close(name="a", told=False)
    story.retry(name="b", back=0)
    story.close(name="b", told=False)
    story.chunk(name="a", chunks=[[4]], acknowledge=False, wait=True)
    story.teardown()
