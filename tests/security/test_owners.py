"""A session belongs to who opened it, whatever is asked of it and however it ended."""

from collections.abc import AsyncIterator

import numpy as np
import pytest

from carousel_server.config import ServerConfig
from carousel_server.engine.engine import Engine
from carousel_server.engine.events import Event
from carousel_server.errors import AlreadyExistsError, NotOwnerError, SessionClosedError

FRAMES = {"x": np.zeros((4, 5), np.float32)}


class Stream:
    """Keeps what a session answers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def deliver(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
async def engine(config: ServerConfig) -> AsyncIterator[Engine]:
    engine = Engine(config)
    await engine.start()
    yield engine
    await engine.stop()


def open_session(engine: Engine, owner: str, *, resume: bool = False, session_id: str = "s") -> Stream:
    stream = Stream()
    engine.open(
        stream,
        session_id=session_id,
        model="tagger",
        version="",
        policy=None,
        resume=resume,
        initial_state={},
        context={},
        owner=owner,
    )
    return stream


async def test_a_session_is_its_owners(engine: Engine):
    """Resume, chunk and close by another owner are refused and move nothing; the owner goes on."""
    stream = open_session(engine, "anna")
    for asked in (
        lambda: open_session(engine, "ben", resume=True),
        lambda: open_session(engine, "ben"),
        lambda: engine.submit(Stream(), "s", 0, FRAMES, end=False, owner="ben"),
        lambda: engine.close(Stream(), "s", owner="ben"),
        lambda: engine.close(Stream(), "s"),
    ):
        with pytest.raises(NotOwnerError, match="session s is not yours"):
            asked()
    engine.submit(stream, "s", 0, FRAMES, end=False, owner="anna")
    again = open_session(engine, "anna", resume=True)
    assert not engine.close(again, "s", owner="anna")


async def test_a_session_that_is_gone_is_still_its_owners(engine: Engine):
    """After its end a session's name tells another owner nothing, and cannot be taken by one."""
    stream = open_session(engine, "anna")
    engine.close(stream, "s", owner="anna")
    for asked in (lambda: open_session(engine, "ben"), lambda: engine.close(stream, "s", owner="ben")):
        with pytest.raises(NotOwnerError):
            asked()
    with pytest.raises(SessionClosedError):
        engine.submit(stream, "s", 0, FRAMES, end=False, owner="anna")
    assert engine.close(stream, "s", owner="anna")


async def test_sessions_are_counted_by_owner(engine: Engine):
    """An owner's open sessions are counted, and those that have ended or were refused are not."""
    stream = open_session(engine, "anna")
    open_session(engine, "anna", session_id="t")
    open_session(engine, "ben", session_id="u")
    with pytest.raises(AlreadyExistsError):
        open_session(engine, "anna", session_id="t")
    assert [engine.sessions.owned(owner) for owner in ("anna", "ben", "carl")] == [2, 1, 0]
    engine.close(stream, "s", owner="anna")
    assert engine.sessions.owned("anna") == 1


async def test_a_state_is_its_owners(engine: Engine):
    """Nobody else gets a session's state, branches it, sees it listed, or opens one under its id."""
    open_session(engine, "anna")
    state = await engine.get_state("s", owner="anna")
    for asked in (
        engine.get_state("s", owner="ben"),
        engine.fork("s", "branch", owner="ben"),
        engine.put_state(state, owner="ben"),
    ):
        with pytest.raises(NotOwnerError, match="session s is not yours"):
            await asked
    await engine.fork("s", "branch", owner="anna")
    await engine.put_state(state, session_id="copy", owner="ben")

    async def listed(owner: str) -> list[str]:
        return [view.session_id for view in await engine.list_sessions(model="", after="", most=9, owner=owner)]

    assert (await listed("anna"), await listed("ben"), await listed("")) == (["branch", "s"], ["copy"], [])
