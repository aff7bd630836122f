"""Sessions without a model: the answer is a function of the stream, whatever the chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carousel_server.config import Limits
from carousel_server.engine.budget import Budget
from carousel_server.engine.events import Closed, Failure, Result
from carousel_server.engine.policy import CARRY, CAUSAL, FULL, LOOKAHEAD, Blocking
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Port
from carousel_server.errors import (
    CarouselError,
    IndexGapError,
    InputRejectedError,
    QueueFullError,
    SessionClosedError,
    TooLargeError,
)

OUTPUT = Port("y", np.dtype("<f4"), (), per_frame=True)
LIMITS = Limits(max_pending_chunks=64, max_block_frames=7, max_buffered_frames=1000)


class Collector:
    def __init__(self):
        self.events = []

    def deliver(self, event):
        self.events.append(event)


def open_session(blocking: Blocking, limits: Limits = LIMITS) -> tuple[Session, Collector]:
    session = Session(
        "s",
        [OUTPUT],
        blocking,
        graph="model.onnx",
        slot=1,
        limits=limits,
        budget=Budget(limits.max_pending_bytes),
        frame_bytes=8,
    )
    session.sink = Collector()
    return session, session.sink


def frames_of(session: Session, start: int, count: int) -> list[float]:
    return [value for arrays, begin, stop in session.pieces(start, count) for value in arrays[0][begin:stop].tolist()]


def run_due(session: Session, blocks: list[tuple[list[float], list[float]]]) -> None:
    """A model whose answer to a frame is the frame itself; what it was run on goes to `blocks`."""
    while session.due:
        frames, ahead = session.next_block()
        seen = frames_of(session, 0, frames)
        blocks.append((seen, frames_of(session, frames, ahead)))
        session.commit(frames, (np.array(seen, np.float32).tobytes(),))


def values(results: list[Result]) -> list[float]:
    return [value for result in results for value in result.arrays([OUTPUT])["y"].tolist()]


blockings = st.one_of(
    st.just(Blocking(CAUSAL)),
    st.just(Blocking(FULL)),
    st.builds(Blocking, st.just(CARRY), st.integers(1, 6)),
    st.builds(Blocking, st.just(LOOKAHEAD), st.integers(1, 6), st.integers(0, 6)),
)
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(blockings, cuts, st.randoms(use_true_random=False), st.booleans())
def test_any_cut_of_a_stream_gives_the_same_answer(blocking, sizes, random, flush_apart):
    """Whatever the chunks, every frame is answered once, in order, and the blocks depend on the stream alone."""
    total = sum(sizes)
    session, sink = open_session(blocking)
    blocks: list[tuple[list[float], list[float]]] = []
    sent = 0
    for index, size in enumerate(sizes):
        chunk = np.arange(sent, sent + size, dtype=np.float32)
        sent += size
        session.accept(index, (chunk,), size, end=sent == total and not flush_apart)
        if random.random() < 0.6:
            run_due(session, blocks)
    if flush_apart:
        session.accept(len(sizes), (), 0, end=True)
    run_due(session, blocks)

    assert values(sink.events) == list(range(total))
    assert [result.index for result in sink.events] == list(range(len(sizes) + flush_apart))
    assert all(
        result.first_frame == before
        for result, before in zip(sink.events, np.cumsum([0] + [result.frames for result in sink.events]), strict=False)
    )
    if blocking.block:
        size, ahead = blocking.block, blocking.ahead
        wanted = [
            (list(range(at, min(at + size, total))), list(range(min(at + size, total), min(at + size + ahead, total))))
            for at in range(0, total, size)
        ]
        assert blocks == wanted
    elif blocking.kind == FULL:
        assert blocks == [(list(range(total)), [])]
    else:
        assert max(len(seen) for seen, _ in blocks) <= LIMITS.max_block_frames


@given(blockings, cuts)
def test_a_chunk_is_answered_as_soon_as_the_stream_settles_it(blocking, sizes):
    """The frames answered with a chunk are a function of the stream so far, so a client can count on them."""
    session, sink = open_session(blocking)
    received = 0
    for index, size in enumerate(sizes):
        received += size
        session.accept(index, (np.zeros(size, np.float32),), size, end=False)
        run_due(session, [])
        answered = sum(result.frames for result in sink.events)
        assert len(sink.events) == index + 1
        assert answered == blocking.final(received, ended=False)
        if blocking.kind == LOOKAHEAD:
            assert received - answered < blocking.block + blocking.ahead


def test_carry_without_a_block_runs_the_clients_chunks():
    """carry(None) feeds the model exactly the chunks that the client cut."""
    session, _ = open_session(Blocking(CARRY))
    blocks: list[tuple[list[float], list[float]]] = []
    session.accept(0, (np.array([0, 1, 2], np.float32),), 3, end=False)
    session.accept(1, (np.array([3], np.float32),), 1, end=True)
    run_due(session, blocks)
    assert blocks == [([0, 1, 2], []), ([3], [])]


def test_the_last_chunk_again_gets_the_stored_answer():
    """A repeated chunk is answered from memory, bit for bit, and runs nothing."""
    session, sink = open_session(Blocking(CAUSAL))
    session.accept(0, (np.array([5], np.float32),), 1, end=False)
    run_due(session, [])
    session.accept(0, (np.array([6], np.float32),), 1, end=False)
    assert not session.due
    assert sink.events[0] == sink.events[1]
    assert values(sink.events[1:]) == [5]


def test_a_repeated_chunk_that_still_waits_is_answered_once():
    """A repeat of a chunk that is not answered yet adds nothing to it."""
    session, sink = open_session(Blocking(CAUSAL))
    for _ in range(2):
        session.accept(0, (np.array([5], np.float32),), 1, end=False)
    run_due(session, [])
    assert values(sink.events) == [5]


@pytest.mark.parametrize("index", [0, 3, 9])
def test_a_gap_names_the_expected_index(index):
    """Any index but the next and those that wait or are kept is refused with what was expected; nothing is taken."""
    session, _ = open_session(Blocking(CAUSAL))
    for good in range(2):
        session.accept(good, (np.zeros(1, np.float32),), 1, end=False)
        run_due(session, [])
    with pytest.raises(IndexGapError) as caught:
        session.accept(index, (np.zeros(1, np.float32),), 1, end=False)
    assert caught.value.metadata == {"expected_index": "2"}
    assert session.next_index == 2


def test_bounds_refuse_and_lose_nothing():
    """A full queue and a full buffer refuse the chunk; it can be sent again later."""
    session, sink = open_session(Blocking(CAUSAL), Limits(max_pending_chunks=2, max_buffered_frames=5))
    session.accept(0, (np.zeros(2, np.float32),), 2, end=False)
    with pytest.raises(TooLargeError, match="6 frames and 5 are allowed"):
        session.accept(1, (np.zeros(4, np.float32),), 4, end=False)
    session.accept(1, (np.zeros(3, np.float32),), 3, end=False)
    with pytest.raises(QueueFullError) as caught:
        session.accept(2, (), 0, end=True)
    assert caught.value.retry_after_s
    run_due(session, [])
    session.accept(2, (np.zeros(3, np.float32),), 3, end=True)
    run_due(session, [])
    assert sum(result.frames for result in sink.events) == 8


def test_nothing_follows_the_end():
    """After `end` a further chunk is refused; the last one can still be asked for again."""
    session, sink = open_session(Blocking(CAUSAL))
    session.accept(0, (np.zeros(1, np.float32),), 1, end=True)
    run_due(session, [])
    with pytest.raises(SessionClosedError):
        session.accept(1, (np.zeros(1, np.float32),), 1, end=False)
    session.accept(0, (np.zeros(1, np.float32),), 1, end=True)
    assert len(sink.events) == 2


@given(blockings, cuts, st.integers(0, 5), st.data())
def test_a_failed_chunk_can_be_sent_again_as_if_it_had_never_come(blocking, sizes, blocks_before, data):
    """Whichever block of a chunk fails, the session goes back to where that chunk began, and a retry ends the same."""
    total = sum(sizes)
    session, sink = open_session(blocking)
    sent = [sum(sizes[:number]) for number in range(len(sizes))]
    failing = data.draw(st.integers(0, len(sizes) - 1))

    def send(index: int) -> None:
        chunk = np.arange(sent[index], sent[index] + sizes[index], dtype=np.float32)
        session.accept(index, (chunk,), sizes[index], end=index == len(sizes) - 1)

    for index in range(failing):
        send(index)
        run_due(session, [])
    for index in range(failing, len(sizes)):
        send(index)
    for _ in range(blocks_before):
        if session.due:
            frames, _ = session.next_block()
            session.commit(frames, (np.array(frames_of(session, 0, frames), np.float32).tobytes(),))
    if not session.due:
        return
    failed = session.next_index - len([chunk for chunk in range(len(sizes)) if chunk >= len(sink.events)])
    session.fail(InputRejectedError("no"))
    failures = [event for event in sink.events if isinstance(event, Failure)]
    assert [failure.index for failure in failures] == list(range(failed, len(sizes)))
    assert isinstance(failures[0].error, InputRejectedError)
    assert all(isinstance(failure.error, IndexGapError) for failure in failures[1:])
    assert session.next_index == failed
    for index in range(failed, len(sizes)):
        send(index)
    run_due(session, [])
    results = [event for event in sink.events if isinstance(event, Result)]
    assert values(results) == list(range(total))


def test_close_waits_for_what_was_accepted():
    """A close after a chunk is told only after the chunk's answer."""
    session, sink = open_session(Blocking(CAUSAL))
    session.accept(0, (np.zeros(1, np.float32),), 1, end=False)
    session.close()
    assert not session.closed
    with pytest.raises(SessionClosedError):
        session.accept(1, (np.zeros(1, np.float32),), 1, end=False)
    run_due(session, [])
    assert session.closed
    assert [type(event) for event in sink.events] == [Result, Closed]


def test_errors_carry_a_stable_reason():
    """Each error class has a reason of its own, but for the branches of the tree that are never raised."""
    leaves = [kind for kind in all_errors(CarouselError) if not kind.__subclasses__()]
    assert len({kind.reason for kind in leaves}) == len(leaves)


def all_errors(kind: type[CarouselError]) -> list[type[CarouselError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


def test_what_no_step_has_begun_is_withdrawn():
    """When nobody waits any more, chunks not begun are forgotten; one in a step, or half run, is finished."""
    session, sink = open_session(Blocking(CARRY, 2))
    for index in range(3):
        session.accept(index, (np.arange(4, dtype=np.float32),), 4, end=index == 2)
    frames, _ = session.next_block()
    session.commit(frames, (np.zeros(frames, np.float32).tobytes(),))
    session.withdraw(running=False)
    assert session.next_index == 1
    run_due(session, [])
    assert [result.index for result in sink.events] == [0]
    session.accept(1, (np.arange(4, dtype=np.float32),), 4, end=False)
    session.withdraw(running=True)
    assert session.next_index == 2
    session.accept(2, (np.arange(4, dtype=np.float32),), 4, end=True)
    run_due(session, [])
    assert sum(result.frames for result in sink.events) == 12


def send_one(session: Session, index: int, *, acknowledged: int | None = None) -> None:
    session.accept(index, (np.array([index], np.float32),), 1, end=False, acknowledged=acknowledged)


def test_every_answer_that_was_not_acknowledged_can_be_had_again():
    """Answers are kept until acknowledged, and a repeat from the oldest gets them as they were, in order."""
    session, sink = open_session(Blocking(CAUSAL))
    for index in range(5):
        send_one(session, index, acknowledged=0)
        run_due(session, [])
    first = list(sink.events)
    session.resume("again")
    session.acknowledge(2)
    for index in range(2, 7):
        send_one(session, index, acknowledged=2)
    run_due(session, [])
    assert sink.events[5:8] == first[2:]
    assert [result.index for result in sink.events[5:]] == [2, 3, 4, 5, 6]
    with pytest.raises(IndexGapError):
        send_one(session, 1)


def test_a_client_in_lock_step_has_one_answer_kept():
    """Whether it acknowledges each answer or none at all, no more than one is kept."""
    for acknowledges in (True, False):
        session, _ = open_session(Blocking(CAUSAL))
        for index in range(20):
            send_one(session, index, acknowledged=index if acknowledges else None)
            run_due(session, [])
            assert len(session.kept) == 1


def test_the_window_bounds_what_is_kept():
    """A client that acknowledges has no more answers kept than may wait; one chunk more is refused, and then taken."""
    session, sink = open_session(Blocking(CAUSAL), Limits(max_pending_chunks=3))
    for index in range(3):
        send_one(session, index, acknowledged=0)
        run_due(session, [])
    with pytest.raises(QueueFullError):
        send_one(session, 3, acknowledged=0)
    send_one(session, 3, acknowledged=1)
    run_due(session, [])
    assert values(sink.events) == [0, 1, 2, 3]


def test_a_stream_gets_the_answers_to_what_it_sent():
    """A chunk that still ran when another stream took the session is answered once it is sent again, in order."""
    session, _ = open_session(Blocking(CAUSAL))
    send_one(session, 0, acknowledged=0)
    run_due(session, [])
    send_one(session, 1, acknowledged=0)
    session.sink = newer = Collector()
    session.resume("again")
    session.withdraw(running=True)
    run_due(session, [])
    assert newer.events == []
    for index in range(3):
        send_one(session, index, acknowledged=0)
    run_due(session, [])
    assert values(newer.events) == [0, 1, 2]


def test_a_failure_of_what_a_stream_did_not_send_is_not_its():
    """A chunk that fails for nobody runs again when it is sent again; no stale refusal meets the next of its index."""
    session, _ = open_session(Blocking(CAUSAL))
    send_one(session, 0, acknowledged=0)
    session.sink = newer = Collector()
    session.resume("again")
    session.fail(InputRejectedError("no"))
    assert newer.events == []
    send_one(session, 0, acknowledged=0)
    run_due(session, [])
    assert values(newer.events) == [0]


def test_a_close_goes_with_the_chunks_before_it():
    """A stream that ends with chunks not begun takes its Close back with them; they and it are sent again."""
    session, sink = open_session(Blocking(CAUSAL))
    send_one(session, 0, acknowledged=0)
    send_one(session, 1, acknowledged=0)
    session.close()
    session.withdraw(running=True)
    run_due(session, [])
    assert not session.closed
    send_one(session, 1, acknowledged=0)
    session.close()
    run_due(session, [])
    assert session.closed
    assert [type(event) for event in sink.events] == [Result, Result, Closed]
