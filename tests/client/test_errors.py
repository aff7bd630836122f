"""Every error that a client can meet, from real servers."""

import shutil
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.client.process import serving

import carousel_client as cc
from carousel_client.outbox import Outbox
from carousel_protos.v1.carousel_pb2 import Chunk, Close, Open, RequestItem, StreamRequest
from carousel_protos.v1.carousel_pb2_grpc import CarouselStub


def test_unknown_model(client):
    """A model that is not there is `NotFound`, with the server's reason."""
    with pytest.raises(cc.NotFound, match="no model 'nobody'") as caught:
        client.infer("nobody", np.zeros((1, 1, 5), np.float32))
    assert caught.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(cc.NotFound), client.session("nobody"):
        pass


def test_a_session_id_in_use_is_refused(shared_address):
    """An id that is open on another client is `AlreadyExists`, told on leaving if nothing was asked before."""
    with (
        cc.connect(shared_address) as first,
        cc.connect(shared_address) as second,
        first.session("speaker", session_id="taken") as session,
    ):
        session.ready()
        with pytest.raises(cc.AlreadyExists) as caught, second.session("speaker", session_id="taken") as other:
            other.send([1])
        assert caught.value.reason == "SESSION_EXISTS"
        with pytest.raises(cc.AlreadyExists), second.session("speaker", session_id="taken"):
            pass
        with second.session("speaker", session_id="taken") as other:
            for _ in range(2):
                with pytest.raises(cc.AlreadyExists):
                    other.ready()
        with pytest.raises(cc.AlreadyExists, match="open in this client"), first.session("speaker", session_id="taken"):
            pass
        assert len(session.send([1])) == 1


@pytest.mark.settings(max_sessions=8)
def test_too_many_sessions_says_when_to_retry(own_server):
    """A full server is `ResourceExhausted`, with the seconds after which a retry can help; a place given up is free."""
    with cc.connect(own_server.address) as client, ExitStack() as stack:
        sessions = [stack.enter_context(client.session("speaker")) for _ in range(7)]
        with client.session("speaker") as last:
            for session in [*sessions, last]:
                session.send([1])
            with pytest.raises(cc.ResourceExhausted) as caught, client.session("speaker") as other:
                other.send([1])
            assert caught.value.reason == "TOO_MANY_SESSIONS"
            assert caught.value.retry_after == 1.0
        with client.session("speaker") as other:
            assert len(other.send([1])) == 1


@pytest.mark.settings(idle_timeout_s=0.2)
def test_an_expired_session(own_server):
    """A session that was idle for too long is `SessionExpired`, a kind of `NotFound`; leaving it is no error."""
    with cc.connect(own_server.address) as client, client.session("speaker") as session:
        session.send([1])
        time.sleep(1.5)
        with pytest.raises(cc.SessionExpired) as caught:
            session.send([2])
        assert isinstance(caught.value, cc.NotFound)


def test_a_sequence_that_has_ended(client):
    """A chunk after the end is `FailedPrecondition`."""
    with client.session("speaker") as session:
        session.send([1], end=True)
        with pytest.raises(cc.FailedPrecondition):
            session.send([2])


def test_a_session_that_another_stream_takes(client, shared_address):
    """A session that a newer stream has resumed is `Aborted` here."""
    with client.session("speaker", session_id="fenced") as session:
        session.send([1])
        with grpc.insecure_channel(shared_address) as channel:
            items = [RequestItem(open=Open(session_id="fenced", model="speaker", resume=True))]
            held = threading.Event()
            call = CarouselStub(channel).Stream(_then_wait(StreamRequest(items=items), held))
            next(iter(call))
            with pytest.raises(cc.Aborted):
                session.send([2])
            held.set()
            call.cancel()


def _then_wait(request, held):
    yield request
    held.wait(20)


def test_timeout(client):
    """An answer that does not come in time is `DeadlineExceeded`; the next chunk follows the one that was late."""
    with client.session("speaker") as session:
        session.send([1])
        with pytest.raises(cc.DeadlineExceeded, match="was not answered within"):
            session.send([2], timeout=1e-6)
        late = session.send([3])
    with client.session("speaker") as session:
        np.testing.assert_array_equal(session.send([1, 2, 3])[2:], late)
    with pytest.raises(cc.DeadlineExceeded):
        client.infer("speaker", np.zeros((32, 4000), np.int64), timeout=1e-3)


def test_messages_over_the_limit(shared_address):
    """A chunk or call that is over `max_message_bytes` is refused here, and the session goes on."""
    with cc.connect(shared_address, max_message_bytes=1000) as client, client.session("speaker") as session:
        with pytest.raises(cc.ResourceExhausted, match="over max_message_bytes"):
            session.send(np.zeros(1000, np.int64))
        assert len(session.send([1])) == 1
        with pytest.raises(cc.ResourceExhausted, match="over max_message_bytes"):
            client.infer("speaker", np.zeros((10, 100), np.int64))


def test_nobody_there():
    """An address where nobody listens is `Unavailable`, with the address."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with cc.connect(address) as client, pytest.raises(cc.Unavailable) as caught:
            client.models()
    wanted = f"no connection to {address} (nobody listens there); check the address, and that a server runs there"
    assert str(caught.value) == wanted
    with cc.connect("nohost.invalid:8001") as client, pytest.raises(cc.Unavailable, match="there is no such host"):
        client.models()


def test_a_server_that_is_killed(own_server):
    """A server that goes without a word is said to be gone, and the address, which was right, is not blamed."""
    with cc.connect(own_server.address, resume_timeout=0.3) as client:
        session = client.session("speaker").__enter__()
        session.send([1])
        own_server.kill()
        for ask in (lambda: session.send([2]), client.models):
            with pytest.raises(cc.Unavailable, match=f"the server at {own_server.address} is gone") as caught:
                ask()
            assert "check the address" not in str(caught.value)


def test_an_array_of_another_dtype_is_told_how_to_convert_it(client):
    """An array of the right shape and another dtype is refused with the call that converts it."""
    with pytest.raises(cc.InvalidArgument, match=r"float64 \[1, 1, 5\]; wanted float32 .*\.astype\(numpy\.float32\)"):
        client.infer("tagger", np.zeros((1, 1, 5)))


@pytest.mark.settings(drain_timeout_s=0.5)
def test_a_server_that_stops_is_announced(own_server):
    """A draining server's GoingAway is kept, and named by the error that its end brings; the client says when."""
    with cc.connect(own_server.address, resume_timeout=0.3) as client:
        session = client.session("speaker").__enter__()
        session.send([1])
        assert client.going_away is None
        assert own_server.stop() == 1  # with a session that had not ended
        assert client.going_away is not None
        assert abs(client.going_away.timestamp() - time.time()) < 10
        with pytest.raises(cc.Unavailable, match="had announced that it stops by"):
            session.send([2])


def test_a_stream_that_waits_for_its_source_is_told_of_the_end(own_server):
    """A loop whose source has nothing to send learns at once that the server has gone."""
    silent = threading.Event()

    def source():
        yield [1]
        silent.wait(20)

    with cc.connect(own_server.address, resume_timeout=0.3) as client:
        stream = client.session("speaker").__enter__().stream(source())
        next(stream)
        own_server.stop()
        with pytest.raises(cc.Unavailable):
            next(stream)
        silent.set()


def test_a_client_that_was_closed(shared_address):
    """A closed client says so, for calls and sessions."""
    client = cc.connect(shared_address)
    session = client.session("speaker").__enter__()
    session.send([1])
    client.close()
    with pytest.raises(cc.FailedPrecondition, match="closed; connect again"):
        client.models()
    with pytest.raises(cc.FailedPrecondition, match="closed; connect again"):
        session.send([2])


def test_a_newer_version_is_used_and_read_as_what_it_is(mixed_models: Path, tmp_path: Path):
    """A session opened after a newer version was loaded runs on it, whatever manifest the client had asked for."""
    shutil.copytree(mixed_models / "speaker", tmp_path / "speaker")
    with serving(tmp_path) as server, cc.connect(server.address) as client:
        with client.session("speaker") as session:
            session.send([1])
            assert session.version == "1"
        shutil.copytree(tmp_path / "speaker" / "1", tmp_path / "speaker" / "2")
        manifest = tmp_path / "speaker" / "2" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"version": "1"', '"version": "2"'))
        client.load("speaker", version="2")
        with client.session("speaker") as session:
            assert session.send([1]).shape == (1, 11)
            assert session.version == "2"
        with client.session("speaker", version="1") as session:
            assert session.version == "1"


def test_items_that_are_ready_leave_in_one_message():
    """What waits leaves together, in order, as far as a message may grow."""
    outbox = Outbox(1000)
    outbox.put(Open(session_id="a", model="m"))
    for index in range(10):
        outbox.put(Chunk(session_id="a", index=index))
    outbox.put(Close(session_id="a"))
    first = outbox.take()
    assert first is not None
    assert [item.WhichOneof("item") for item in first.items] == ["open", *["chunk"] * 10, "close"]
    for index in range(100):
        outbox.put(Chunk(session_id="a", index=index))
    messages = []
    while (message := outbox.take()) is not None:
        assert message.ByteSize() <= 1000
        messages.append(message)
    assert len(messages) > 1
    assert [item.chunk.index for message in messages for item in message.items] == list(range(100))
