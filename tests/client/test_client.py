"""The blocking client against a real server, its answers against eager PyTorch."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.client.conftest import Mixer
from tests.support.models import Speaker, Tagger, carried, looked_ahead, make, whole

import carousel_client as cc

RNG = np.random.default_rng(5)


def frames(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 5)).astype(np.float32)


def cut(x: np.ndarray, *sizes: int) -> list[np.ndarray]:
    assert sum(sizes) == len(x)
    return np.split(x, np.cumsum(sizes)[:-1])


def near(got: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(23,), (1,) * 23, (2, 9, 1, 11)])
def test_stream_gives_the_eager_answer_however_it_is_cut(client, sizes):
    """One answer comes for each chunk and one for the flush, and together they are the eager lookahead answer."""
    x = frames(23)
    with client.session("tagger") as session:
        answers = list(session.stream(cut(x, *sizes)))
    assert len(answers) == len(sizes) + 1
    assert all(answer.shape[1:] == (3,) and answer.dtype == np.float32 for answer in answers)
    near(np.concatenate(answers), looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2))


def test_session_has_the_policy_that_was_asked_for(client):
    """A session's policy is what was asked or else the bundle's, and its answers follow it."""
    x = frames(10)
    with client.session("tagger", policy=cc.Carry(3), session_id="mine") as session:
        assert (session.id, session.policy, session.version) == ("mine", cc.Carry(3), "1")
        answers = [session.send(x[:5]), session.send(x[5:], end=True)]
    assert [len(answer) for answer in answers] == [3, 7]
    near(np.concatenate(answers), carried(make(Tagger), torch.from_numpy(x), [3, 3, 3, 1]))
    with client.session("tagger") as session:
        assert session.policy == cc.Lookahead(4, 2)
    with client.session("tagger", policy=cc.Full()) as session:
        assert len(session.send(x)) == 0
        near(session.send(end=True), whole(make(Tagger), torch.from_numpy(x)))


def test_session_starts_from_an_initial_state(client):
    """A sequence that is cut in two sessions, the second given the first one's state, is the whole one's answer."""
    model, tokens = make(Speaker), torch.tensor([3, 1, 4, 1, 5, 9])
    with torch.no_grad():
        _, (h, c) = model.lstm(model.embedding(tokens[None, :4]))
    state = {"lstm.h_0": h[:, 0].numpy(), "lstm.c_0": c[:, 0].tolist()}
    with client.session("speaker", initial_state=state) as session:
        near(session.send(tokens[4:].numpy()), whole(model, tokens)[4:])
    with (
        pytest.raises(cc.InvalidArgument, match=r"no state 'h_0'; it has lstm\.h_0, lstm\.c_0"),
        client.session("speaker", initial_state={"h_0": h[:, 0].numpy()}),
    ):
        pass


def test_lists_take_the_models_dtype(client):
    """Lists of numbers are converted to the input's dtype."""
    with client.session("speaker") as session:
        got = [session.send([token]) for token in (3, 1, 4)]
    near(np.concatenate(got), whole(make(Speaker), torch.tensor([3, 1, 4])))


def test_models_with_several_tensors_take_and_give_dicts(client):
    """Chunks and answers are dicts by name, a sequence-level output is its value so far, and None before any frame."""
    model, x, ids = make(Mixer), torch.randn(7, 4), torch.randint(0, 6, (7,))
    with torch.no_grad():
        wanted, _ = model(x[:, None], ids[:, None])
        summaries = [model(x[:stop, None], ids[:stop, None])[1][0] for stop in (3, 7)]
    chunks = [{"x": x[:3].numpy(), "ids": ids[:3].numpy()}, {"x": x[3:].numpy(), "ids": ids[3:].numpy()}]
    with client.session("mixer") as session:
        answers = list(session.stream(chunks))
    near(np.concatenate([answer["frames"] for answer in answers]), wanted[:, 0])
    for answer, summary in zip(answers, [*summaries, summaries[-1]], strict=True):
        near(answer["summary"], summary)
    with client.session("mixer", policy=cc.Full()) as session:
        assert session.send(chunks[0])["summary"] is None


def test_infer_is_the_eager_call(client):
    """`infer` takes and returns what the eager model does, in its own axes, and zeros after a row's length."""
    x = torch.randn(3, 8, 5)
    with torch.no_grad():
        near(client.infer("tagger", x.numpy()), make(Tagger)(x))
    ragged = client.infer("tagger", x.numpy(), lengths=[8, 1, 5])
    for row, length in enumerate([8, 1, 5]):
        near(ragged[row, :length], whole(make(Tagger), x[row, :length]))
        assert not ragged[row, length:].any()
    x, ids = torch.randn(6, 2, 4), torch.randint(0, 6, (6, 2))
    with torch.no_grad():
        wanted = make(Mixer)(x, ids)
    got = client.infer("mixer", {"x": x.numpy(), "ids": ids.numpy()})
    near(got["frames"], wanted[0])
    near(got["summary"], wanted[1])


def test_a_live_source_is_answered_before_it_goes_on(client):
    """A chunk is sent and its answer given without waiting for the next chunk to exist."""
    answered = threading.Event()

    def live() -> Iterator[list[int]]:
        for token in (3, 1, 4):
            answered.clear()
            yield [token]
            assert answered.wait(20)

    with client.session("speaker") as session:
        answers = []
        for answer in session.stream(live()):
            answers.append(answer)
            answered.set()
    near(np.concatenate(answers), whole(make(Speaker), torch.tensor([3, 1, 4])))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_flow_control_bounds_what_is_taken_from_the_source(client, in_flight):
    """No more than `in_flight` chunks are ahead of the answers that were taken, and that many are."""
    taken = yielded = 0
    ahead = []

    def counted() -> Iterator[list[int]]:
        nonlocal taken
        for _ in range(12):
            taken += 1
            ahead.append(taken - yielded)
            yield [taken % 11]

    with client.session("speaker") as session:
        for _ in session.stream(counted(), in_flight=in_flight):
            threading.Event().wait(0.01)  # a slow reader
            yielded += 1
    # While the loop's body runs, the answer that it has was taken and is not counted in `yielded` yet.
    assert in_flight <= max(ahead) <= in_flight + 1


def test_what_the_source_raises_is_raised_after_the_answers(client):
    """The answers to what a source gave come first, then its error."""

    def broken() -> Iterator[list[int]]:
        yield [1]
        yield [2]
        raise LookupError("no more")

    with client.session("speaker") as session:
        stream = session.stream(broken())
        near(np.concatenate([next(stream), next(stream)]), whole(make(Speaker), torch.tensor([1, 2])))
        with pytest.raises(LookupError, match="no more"):
            next(stream)


def test_nothing_is_sent_after_a_loop_is_left(client):
    """Leaving the loop stops the source: a chunk that it gives later is not sent."""
    held = threading.Event()
    left = threading.Event()

    def source() -> Iterator[list[int]]:
        yield [1]
        held.set()
        assert left.wait(20)
        yield [2]

    with client.session("speaker") as session:
        for _ in session.stream(source()):
            assert held.wait(20)
            break
        left.set()
        for thread in threading.enumerate():
            if thread.name == "carousel-feeder":
                thread.join(20)
        near(session.send([3]), whole(make(Speaker), torch.tensor([1, 3]))[1:])


def test_a_refused_chunk_leaves_the_session_where_it_was(client):
    """After a chunk that the server refused, with others under way behind it, the session goes on from before it."""
    x = frames(6)
    bad = np.full((1, 5), np.nan, np.float32)
    with client.session("tagger", policy=cc.Carry()) as session:
        got = []
        with pytest.raises(cc.InvalidArgument, match="not finite") as caught:
            got.extend(session.stream([x[:2], bad, x[:1], x[:1], x[:1]]))
        assert caught.value.reason == "BAD_TENSOR"
        got = [session.send(x[2:3]), *session.stream([x[3:5], x[5:]])]
    near(np.concatenate(got), carried(make(Tagger), torch.from_numpy(x), [2, 1, 2, 1])[2:])


@pytest.mark.parametrize(
    ("chunk", "sentence"),
    [
        (np.zeros((3, 5)), r"tensor 'x' of a chunk for tagger is float64 \[3, 5\]; wanted float32 \[frames, 5\]"),
        (np.zeros((3, 4), np.float32), r"float32 \[3, 4\]; wanted float32 \[frames, 5\]"),
        ([0.0] * 5, r"\[5\]; wanted"),
        ([[1, 2], [3]], "is no array"),
        (np.zeros((0, 5), np.float32), "no frames"),
        ({"y": [[0.0] * 5]}, r"has the tensors \['y'\]; wanted \['x'\]"),
        (None, "without frames"),
    ],
)
def test_a_chunk_that_does_not_fit_is_never_sent(client, chunk, sentence):
    """The client says what came and what is wanted before anything is sent, and the session goes on."""
    x = frames(2)
    with client.session("tagger", policy=cc.Carry()) as session:
        with pytest.raises(cc.InvalidArgument, match=sentence):
            session.send(chunk)
        near(session.send(x), carried(make(Tagger), torch.from_numpy(x), [2]))


def test_numbers_are_not_rounded_to_fit(client):
    """A list of fractions is refused where whole numbers are wanted, as is one that is out of range."""
    with client.session("speaker") as session:
        with pytest.raises(cc.InvalidArgument, match=r"float64 \[1\]; wanted int64"):
            session.send([1.5])
        for number in (2**63, 2**64):
            with pytest.raises(cc.InvalidArgument, match="wanted int64"):
                session.send([number])


def test_many_threads_share_one_client(client):
    """Sessions in many threads, all on one stream, each get the answer to their own frames."""
    inputs = [frames(int(count)) for count in RNG.integers(1, 30, 24)]

    def run(x: np.ndarray) -> np.ndarray:
        with client.session("tagger") as session:
            return np.concatenate(list(session.stream(x[at : at + 3] for at in range(0, len(x), 3))))

    with ThreadPoolExecutor(12) as pool:
        for x, got in zip(inputs, pool.map(run, inputs), strict=True):
            near(got, looked_ahead(make(Tagger), torch.from_numpy(x), 4, 2))


def test_catalogue(own_server):
    """Models are listed, described, unloaded and loaded; one that is not loaded is refused with what to do."""
    with cc.connect(own_server.address) as client:
        assert [(model.name, model.version) for model in client.models()] == [
            ("mixer", "1"),
            ("speaker", "1"),
            ("tagger", "1"),
        ]
        client.infer("tagger", np.zeros((2, 3, 5), np.float32))
        described = client.model("tagger")
        assert described.manifest.layers[0].num_directions == 2
        assert described.statistics.rows == 2
        assert [model.name for model in client.unload("tagger").models] == ["tagger"]
    with cc.connect(own_server.address) as client:
        with pytest.raises(cc.CarouselError, match="not loaded"), client.session("tagger"):
            pass
        assert client.load("tagger").version == "1"
        with client.session("tagger") as session:
            session.send(frames(1))
