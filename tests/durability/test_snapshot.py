"""A state taken at any moment, and a session that goes on from it in another model: the same bits."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from carousel_protos import Bundle
from carousel_protos.v1.state_pb2 import SessionState
from carousel_server.config import Limits
from carousel_server.engine.events import Event, Result
from carousel_server.engine.model import Model
from carousel_server.engine.policy import CARRY, CAUSAL, FULL, LOOKAHEAD, Blocking
from carousel_server.engine.portable import seal, unseal
from carousel_server.engine.runtime import load_runtimes
from carousel_server.engine.session import Session
from carousel_server.errors import CarouselError, ContextFullError, SessionClosedError

LIMITS = Limits(max_sessions=1000, max_block_frames=5)


@dataclass
class Collector:
    events: list[Event] = field(default_factory=list)

    def deliver(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def pairs(durable_models: Path) -> dict[str, tuple[Model, Model]]:
    """Each model loaded twice, as two servers have it."""

    def load(name: str) -> Model:
        bundle = Bundle.open(durable_models / name / "1")
        return Model(bundle.manifest, load_runtimes(bundle, device="cpu", threads=1), LIMITS)

    return {name: (load(name), load(name)) for name in POLICIES}


def frames_of(name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    match name:
        case "tagger":
            return {"x": draw.standard_normal((count, 5), np.float32)}
        case "conditioned":
            return {"x": draw.standard_normal((count, 4), np.float32)}
    return {"x": draw.standard_normal((count, 4), np.float32), "ids": draw.integers(0, 6, count)}


SPEAKER = {"speaker": np.array([0.5, -1, 2], np.float32)}
POLICIES = {
    "tagger": [
        Blocking(LOOKAHEAD, 4, 2),
        Blocking(LOOKAHEAD, 1, 3),
        Blocking(CARRY, 3),
        Blocking(CARRY),
        Blocking(FULL),
    ],
    "conditioned": [Blocking(CAUSAL), Blocking(CARRY, 2), Blocking(FULL)],
    "mixer": [Blocking(CAUSAL), Blocking(FULL)],
}
streams = st.sampled_from([(name, policy) for name, policies in POLICIES.items() for policy in policies])


class Stream:
    """A sequence cut into chunks, and a session that takes them one by one."""

    def __init__(self, name: str, blocking: Blocking, sizes: list[int]) -> None:
        self.blocking = blocking
        whole = frames_of(name, sum(sizes), seed=len(sizes))
        ends = np.cumsum(sizes)
        self.chunks = [
            {key: values[end - size : end] for key, values in whole.items()}
            for end, size in zip(ends, sizes, strict=True)
        ]
        self.context = SPEAKER if name == "conditioned" else {}

    def open(self, model: Model) -> Session:
        session = model.open("s", self.blocking.message(), {}, self.context)
        session.sink = Collector()
        return session

    def send(self, model: Model, session: Session, index: int, acknowledged: int | None = None) -> None:
        end = index == len(self.chunks) - 1
        model.submit(session, index, self.chunks[index], end=end, acknowledged=acknowledged)


def finish(model: Model, session: Session) -> list[Event]:
    """What it has answered, once nothing is left to run; the session is gone then."""
    while model.steps.turn():
        pass
    events = session.sink.events
    model.release(session)
    return events


@settings(max_examples=300, deadline=None)
@given(streams, st.lists(st.integers(1, 12), min_size=1, max_size=7), st.data())
def test_a_state_taken_at_any_moment_goes_on_with_the_same_bits(pairs, chosen, sizes, data):
    """Whatever waits or is half run, the state is that of the last answer, and from there every answer is the same."""
    name, blocking = chosen
    here, there = pairs[name]
    stream = Stream(name, blocking, sizes)
    session = stream.open(here)
    for index in range(len(sizes)):
        stream.send(here, session, index)
    wanted = finish(here, session)
    assert [event.index for event in wanted] == list(range(len(sizes)))

    session = stream.open(here)
    lag = data.draw(st.sampled_from([None, 0, 2]), label="answers not acknowledged")
    for index in range(data.draw(st.integers(0, len(sizes)), label="sent before")):
        stream.send(here, session, index, None if lag is None else max(0, len(session.sink.events) - lag))
        for _ in range(data.draw(st.integers(0, 4), label="steps")):
            here.steps.turn()
    answered = list(session.sink.events)
    sealed = here.snapshot(session)
    branch = here.fork(session, "branch")
    branch.sink = Collector()
    moved = there.restore("s", unseal(sealed))
    moved.sink = Collector()
    assert moved.next_index == branch.next_index == len(answered)
    assert there.snapshot(moved) == sealed
    for kept in session.kept:
        moved.accept(kept.index, (), 0, end=False)
    assert moved.sink.events == list(session.kept)
    moved.sink.events.clear()
    for index in range(session.next_index, len(sizes)):
        stream.send(here, session, index)
    assert finish(here, session) == wanted
    for model, other in ((there, moved), (here, branch)):
        for index in range(len(answered), len(sizes)):
            stream.send(model, other, index)
        rest = [event for event in finish(model, other) if isinstance(event, Result)]
        assert [(r.index, r.first_frame, r.frames, r.data) for r in rest] == [
            (r.index, r.first_frame, r.frames, r.data) for r in wanted[len(answered) :]
        ]


@pytest.mark.parametrize("name", POLICIES)
def test_a_forged_state_is_refused_in_a_line_or_runs(pairs, name: str):
    """Bytes changed under a right checksum never break the server: a clear refusal, or a session that works."""
    model, _ = pairs[name]
    before = model.open_sessions
    stream = Stream(name, POLICIES[name][0], [7, 3])
    session = stream.open(model)
    stream.send(model, session, 0)
    while model.steps.turn():
        pass
    written = unseal(model.snapshot(session)).SerializeToString()
    model.release(session)
    draw, refusals, ran = Random(8), [], 0
    for _ in range(600):
        forged = bytearray(written)
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(len(forged))
            forged[at : at + draw.choice((0, 1, 1, 4))] = draw.randbytes(draw.choice((0, 1, 1, 3)))
        try:
            state = SessionState.FromString(bytes(forged))
        except DecodeError:
            continue
        try:
            session = model.restore("forged", unseal(seal(state)))
        except CarouselError as error:
            refusals.append(str(error))
            continue
        session.sink = Collector()
        with suppress(SessionClosedError):  # what was changed may be whether the sequence has ended
            model.submit(session, session.next_index, stream.chunks[1], end=True)
        finish(model, session)
        ran += 1
    assert model.open_sessions == before
    assert min(len(refusals), ran) > 20, (refusals, ran)
    assert [said for said in refusals if "\n" in said] == []


def test_branches_share_their_context(durable_models: Path):
    """A context that branches share counts once against the limit, and goes with the last of them."""
    bundle = Bundle.open(durable_models / "conditioned" / "1")
    runtimes = load_runtimes(bundle, device="cpu", threads=1)
    model = Model(bundle.manifest, runtimes, Limits(max_sessions=4, max_context_bytes=20))
    trunk = model.open("trunk", None, {}, SPEAKER)
    branch = model.fork(trunk, "branch")
    assert branch.context is trunk.context
    model.release(trunk)
    with pytest.raises(ContextFullError, match="would hold 24 bytes and 20 are allowed"):
        model.open("other", None, {}, SPEAKER)
    model.release(branch)
    model.release(model.open("other", None, {}, SPEAKER))
