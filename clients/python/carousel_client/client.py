"""The blocking client. `carousel_client.aio` is the same with `async`."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

import grpc

from carousel_client.access import TLS, Access
from carousel_client.connection import Connection, Settings
from carousel_client.errors import DeadlineExceeded
from carousel_client.feeder import Feeder
from carousel_client.policies import Policy, from_message
from carousel_client.requests import (
    MAX_MESSAGE_BYTES,
    RESUME_TIMEOUT_S,
    SessionOptions,
    drop_request,
    infer_request,
    put_request,
    unload_request,
)
from carousel_client.signature import Answer
from carousel_protos.v1.carousel_pb2 import (
    Chunk,
    ForkRequest,
    GetModelRequest,
    GetModelResponse,
    GetStateRequest,
    ListModelsRequest,
    ListSessionsRequest,
    LoadModelRequest,
    ModelStatus,
    Result,
    SessionInfo,
    UnloadModelResponse,
)

T = TypeVar("T")


def connect(
    target: str,
    *,
    tls: bool | TLS | grpc.ChannelCredentials = False,
    token: str | None = None,
    insecure: bool = False,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    resume_timeout: float = RESUME_TIMEOUT_S,
) -> "Client":
    """A client of the server at `target`, such as "localhost:8001"; nothing is sent yet.

    `tls` True encrypts and checks the server's certificate; a `TLS` says more, such as which authorities are believed;
    gRPC's own credentials are taken as they are. `token` says who calls; it is not sent unencrypted to another machine
    unless the network is said to be trusted (`insecure`). `max_message_bytes` bounds what this client sends and should
    be the server's own limit. Where the connection breaks, sessions go on by themselves on another one; they fail with
    `Unavailable` once the server was not back for `resume_timeout` seconds (0: at once). Raises `InvalidArgument` for
    files that cannot be used.
    """
    return Client(Connection(Settings(Access(target, tls, token, insecure), max_message_bytes, resume_timeout)))


class Client:
    """A connection to a server, safe to use from many threads; its sessions share one stream. Made by `connect`.

    Every method raises `CarouselError`: `NotFound` for a model that the server has not, `Unavailable` where nobody
    answers, `DeadlineExceeded` after `timeout` seconds (None: no limit).
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and the connection. Sessions that are still open fail."""
        self._connection.close()

    @property
    def target(self) -> str:
        return self._connection.target

    @property
    def going_away(self) -> datetime | None:
        """When the server has announced that it will stop; None where it has not."""
        return max((at for stream in self._connection.streams if (at := stream.announced) is not None), default=None)

    def session(
        self,
        model: str,
        *,
        policy: Policy | None = None,
        version: str = "",
        variant: str = "",
        session_id: str | None = None,
        initial_state: Mapping[str, object] | None = None,
        context: Mapping[str, object] | None = None,
        resume: bool = False,
        timeout: float | None = None,
    ) -> "Session":
        """A session with `model`, to be used in a `with` statement.

        `policy` None is the bundle's default, `version` "" the newest that is served, `variant` "" the server's choice,
        `session_id` None a random one. `initial_state` maps state inputs to `[layers × directions, size]`; those left
        out start as the model does. `context` maps each of the model's contexts (`GetModel`'s manifest names them) to
        `[…]`; it holds for the whole session. `resume` takes up the session `session_id`, which another client or
        process began and which is then `Fenced` there: its `next_index` says with which chunk to go on. `timeout`
        seconds bound the question for the model's manifest, which is asked once.
        """
        options = SessionOptions(model, version, policy, session_id, initial_state, context, timeout, variant, resume)
        return Session(self._connection, options)

    def infer(
        self,
        model: str,
        inputs: object,
        *,
        lengths: Sequence[int] | None = None,
        version: str = "",
        variant: str = "",
        timeout: float | None = None,
    ) -> Answer:
        """What the eager model answers to whole sequences, in its own dimensions, batch included; stateless.

        `inputs` is an array for a model with one input and a dict by name otherwise, contexts among them; the answer
        likewise by outputs.
        `lengths` are the valid frames of each row; an answer is zero after them.
        """
        signature = self._connection.signature(model, version, timeout)
        request = infer_request(signature, inputs, lengths, version, variant, self._connection.max_message_bytes)
        response = self._connection.unary(self._connection.stub.Infer, request, timeout)
        return self._connection.signature(model, response.version, timeout).decode_batch(response)

    def get_state(self, session_id: str, *, timeout: float | None = None) -> bytes:
        """A session's state as of the chunk that was answered last; the session goes on meanwhile.

        The bytes are versioned and checksummed, and hold a user's data: h and c, frames that wait, the last answers.
        """
        request = GetStateRequest(session_id=session_id)
        return self._connection.unary(self._connection.stub.GetState, request, timeout, session_id).state

    def put_state(
        self,
        state: bytes,
        *,
        session_id: str = "",
        version: str = "",
        move: bool = False,
        timeout: float | None = None,
    ) -> SessionInfo:
        """A new session that goes on from a state that `get_state` gave, of this server or another one.

        `session(…, session_id=…, resume=True)` takes it up. `session_id` "" is the one that it had, which must be free
        here; under another one it is a branch. `version` "" is the one that it was on. `move` takes the state to a
        version with other weights and the same tensors; without it that is `FailedPrecondition`. Raises
        `InvalidArgument` for bytes that were changed.
        """
        request = put_request(state, session_id, version, move, self._connection.max_message_bytes)
        return self._connection.unary(self._connection.stub.PutState, request, timeout, session_id).session

    def fork(self, session_id: str, *, new_id: str = "", timeout: float | None = None) -> SessionInfo:
        """A second session that goes on from the chunk that one answered last, and knows nothing of it afterwards.

        `session(…, session_id=…, resume=True)` takes it up. `new_id` "" is a random one.
        """
        request = ForkRequest(session_id=session_id, new_session_id=new_id)
        return self._connection.unary(self._connection.stub.Fork, request, timeout, session_id).session

    def sessions(self, *, model: str = "", timeout: float | None = None) -> list[SessionInfo]:
        """This client's own sessions on the server, by id; `model` "" is every one's. `timeout` bounds each page."""
        found: list[SessionInfo] = []
        request = ListSessionsRequest(model=model)
        while True:
            page = self._connection.unary(self._connection.stub.ListSessions, request, timeout)
            found.extend(page.sessions)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def drop(self, session_id: str, *, timeout: float | None = None) -> None:
        """Close a session, whoever holds it. Raises `NotFound` for one that is not there."""
        state = self._connection.open(drop_request(session_id))
        _wait(self._connection.end(state), timeout, f"session {session_id} was not closed")

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """Every model and version that the server has, loaded or not."""
        return list(self._connection.unary(self._connection.stub.ListModels, ListModelsRequest(), timeout).models)

    def model(self, model: str, *, version: str = "", timeout: float | None = None) -> GetModelResponse:
        """A model's `status`, `manifest` and `statistics`; `version` "" is the newest."""
        request = GetModelRequest(model=model, version=version)
        return self._connection.unary(self._connection.stub.GetModel, request, timeout)

    def load(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelStatus:
        """Load what is on the server's disk; `version` "" is the newest there."""
        request = LoadModelRequest(model=model, version=version)
        return self._connection.unary(self._connection.stub.LoadModel, request, timeout).status

    def unload(
        self,
        model: str,
        *,
        version: str = "",
        deadline: float | None = None,
        move: bool = False,
        move_to: str = "",
        timeout: float | None = None,
    ) -> UnloadModelResponse:
        """Retire a version, or with "" every one: it takes no new sessions, and is unloaded after its last one.

        `deadline` seconds from now what is left of its sessions is ended (None: the server's choice). `move` takes them
        to the version `move_to` ("": the newest) where the tensors are the same; the answer says how many went, and
        which stay and why.
        """
        request = unload_request(model, version, deadline, move, move_to)
        return self._connection.unary(self._connection.stub.UnloadModel, request, timeout)


class Session:
    """A sequence whose h and c live on the server. Made by `Client.session`.

    Entering it sends Open without waiting for the answer, so that the first chunks follow at once: a refusal (such as
    `AlreadyExists`) is raised by the first call that needs an answer, at the latest on leaving. A chunk that the server
    refuses leaves the state where it was, and the session goes on. So it does after a broken connection: chunks whose
    answers have not come are kept and sent again, and each is run once. Chunks wait to be sent while as many as the
    server allows, or 16 MiB, have no answer.
    """

    def __init__(self, connection: Connection, options: SessionOptions) -> None:
        self._connection = connection
        self._options = options
        # Held while a chunk waits to be sent, so that chunks keep their order.
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        options = self._options
        self._signature = self._connection.signature(options.model, options.version, options.timeout)
        self._state = self._connection.open(options.request(self._signature))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = self._connection.end(self._state)
        if error is None:
            _wait(ended, None, "")

    @property
    def id(self) -> str:
        return self._state.id

    @property
    def policy(self) -> Policy:
        """The policy that the server runs this session under; waits for it to be opened."""
        self.ready()
        assert self._state.opened is not None, "ready waited for it"
        return from_message(self._state.opened.policy)

    @property
    def version(self) -> str:
        """The version that serves this session; waits for it to be opened."""
        self.ready()
        assert self._state.opened is not None, "ready waited for it"
        return self._state.opened.version

    @property
    def next_index(self) -> int:
        """How many chunks this session had had when it was opened here: not 0 where it was resumed. Waits for that."""
        self.ready()
        return self._state.first_index

    def ready(self, *, timeout: float | None = None) -> None:
        """Wait until the server has opened the session. Raises what it refuses it with."""
        _wait(self._connection.wait_opened(self._state), timeout, f"session {self.id} was not opened")

    def send(self, chunk: object = None, *, end: bool = False, timeout: float | None = None) -> Answer:
        """Send a chunk and wait for the frames that became final with it, possibly none.

        `chunk` is `[frames, …]` for a model with one input and a dict of such by name otherwise. `end` ends the
        sequence with this chunk, which may be None, and flushes what is held back. After a `DeadlineExceeded` the chunk
        may still be run; the next one follows it.
        """
        what = f"a chunk of session {self.id} was not answered"
        return self._answer(_wait(self._send(chunk, end, timeout), timeout, what))

    def stream(self, chunks: Iterable[object], *, in_flight: int = 8) -> Iterator[Answer]:
        """Send `chunks` and yield the frames that became final with each: one answer for each chunk, and one more.

        The last answer is what an empty chunk flushes, which ends the sequence when `chunks` is exhausted; so a chunk
        never waits for the next one. `chunks` is iterated in a thread of its own, at most `in_flight` ahead of what was
        yielded, so that it may be a live source. What it raises is raised here, after the answers to what came before.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}; it must be at least 1")
        ended = self._connection.watch(self._state)
        feeder = Feeder(chunks, self._send, ended, in_flight)
        try:
            for result in feeder:
                yield self._answer(result)
        finally:
            self._connection.unwatch(self._state, ended)
            feeder.stop()

    def _send(self, chunk: object, end: bool, timeout: float | None = None) -> Future[Result]:
        message = Chunk(end=end)
        self._signature.encode_chunk(message.tensors, chunk, end=end)
        with self._sending:
            try:
                return self._connection.send(self._state, message, timeout)
            except TimeoutError:
                raise DeadlineExceeded(f"a chunk of session {self.id} was not sent within {timeout} s") from None

    def _answer(self, result: Result) -> Answer:
        assert self._state.opened is not None, "a result comes after Opened"
        # The newest version may be a newer one than when this client asked.
        if (version := self._state.opened.version) != self._signature.version:
            self._signature = self._connection.signature(self._options.model, version)
        return self._signature.decode_chunk(result)


def _wait(answer: "Future[T]", timeout: float | None, what: str) -> T:
    try:
        return answer.result(timeout)
    except TimeoutError:
        raise DeadlineExceeded(f"{what} within {timeout} s") from None
