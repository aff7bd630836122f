"""The asyncio client. `carousel_client` is the same without `async`."""

# ruff: noqa: ASYNC109 -- the same parameters as the blocking client's

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

import grpc

from carousel_client.access import TLS, Access
from carousel_client.aio.connection import Connection
from carousel_client.connection import Settings
from carousel_client.errors import DeadlineExceeded, FailedPrecondition
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
    Opened,
    Result,
    SessionInfo,
    UnloadModelResponse,
)

T = TypeVar("T")
_EXHAUSTED = object()


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
    return Client(Settings(Access(target, tls, token, insecure), max_message_bytes, resume_timeout))


class Client:
    """A connection to a server, to be used in `async with`; its sessions share one stream. Made by `connect`.

    Every method raises `CarouselError`: `NotFound` for a model that the server has not, `Unavailable` where nobody
    answers, `DeadlineExceeded` after `timeout` seconds (None: no limit).
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __aenter__(self) -> Self:
        self._connection = Connection(self._settings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._connection.close()

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
        out start as the model does; `context` maps each of the model's contexts (`GetModel`'s manifest names them); it
        holds for the whole session. `resume` takes up the session `session_id`, which another client or process began
        and which is then `Fenced` there: its `next_index` says with which chunk to go on. `timeout` seconds bound the
        question for the model's manifest, which is asked once.
        """
        options = SessionOptions(model, version, policy, session_id, initial_state, context, timeout, variant, resume)
        return Session(self._connection, options)

    async def infer(
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
        signature = await self._connection.signature(model, version, timeout)
        request = infer_request(signature, inputs, lengths, version, variant, self._connection.max_message_bytes)
        response = await self._connection.unary(self._connection.stub.Infer, request, timeout)
        return (await self._connection.signature(model, response.version, timeout)).decode_batch(response)

    async def get_state(self, session_id: str, *, timeout: float | None = None) -> bytes:
        """A session's state as of the chunk that was answered last; the session goes on meanwhile.

        The bytes are versioned and checksummed, and hold a user's data: h and c, frames that wait, the last answers.
        """
        request = GetStateRequest(session_id=session_id)
        return (await self._connection.unary(self._connection.stub.GetState, request, timeout, session_id)).state

    async def put_state(
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
        return (await self._connection.unary(self._connection.stub.PutState, request, timeout, session_id)).session

    async def fork(self, session_id: str, *, new_id: str = "", timeout: float | None = None) -> SessionInfo:
        """A second session that goes on from the chunk that one answered last, and knows nothing of it afterwards.

        `session(…, session_id=…, resume=True)` takes it up. `new_id` "" is a random one.
        """
        request = ForkRequest(session_id=session_id, new_session_id=new_id)
        return (await self._connection.unary(self._connection.stub.Fork, request, timeout, session_id)).session

    async def sessions(self, *, model: str = "", timeout: float | None = None) -> list[SessionInfo]:
        """This client's own sessions on the server, by id; `model` "" is every one's. `timeout` bounds each page."""
        found: list[SessionInfo] = []
        request = ListSessionsRequest(model=model)
        while True:
            page = await self._connection.unary(self._connection.stub.ListSessions, request, timeout)
            found.extend(page.sessions)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def drop(self, session_id: str, *, timeout: float | None = None) -> None:
        """Close a session, whoever holds it. Raises `NotFound` for one that is not there."""
        state = self._connection.open(drop_request(session_id))
        await _wait(self._connection.end(state), timeout, f"session {session_id} was not closed")

    async def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """Every model and version that the server has, loaded or not."""
        response = await self._connection.unary(self._connection.stub.ListModels, ListModelsRequest(), timeout)
        return list(response.models)

    async def model(self, model: str, *, version: str = "", timeout: float | None = None) -> GetModelResponse:
        """A model's `status`, `manifest` and `statistics`; `version` "" is the newest."""
        request = GetModelRequest(model=model, version=version)
        return await self._connection.unary(self._connection.stub.GetModel, request, timeout)

    async def load(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelStatus:
        """Load what is on the server's disk; `version` "" is the newest there."""
        request = LoadModelRequest(model=model, version=version)
        return (await self._connection.unary(self._connection.stub.LoadModel, request, timeout)).status

    async def unload(
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
        return await self._connection.unary(self._connection.stub.UnloadModel, request, timeout)


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
        self._sending = asyncio.Lock()

    async def __aenter__(self) -> Self:
        options = self._options
        self._signature = await self._connection.signature(options.model, options.version, options.timeout)
        self._state = self._connection.open(options.request(self._signature))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = self._connection.end(self._state)
        if error is None:
            await ended
        else:
            _forget(ended)

    @property
    def id(self) -> str:
        return self._state.id

    @property
    def policy(self) -> Policy:
        """The policy that the server runs this session under; known from the first answer, or `ready`, on."""
        return from_message(self._opened().policy)

    @property
    def version(self) -> str:
        """The version that serves this session; known from the first answer, or `ready`, on."""
        return self._opened().version

    @property
    def next_index(self) -> int:
        """How many chunks this session had had when it was opened here: not 0 where it was resumed. Known as `policy`
        is."""
        self._opened()
        return self._state.first_index

    async def ready(self, *, timeout: float | None = None) -> None:
        """Wait until the server has opened the session. Raises what it refuses it with."""
        await _wait(self._connection.wait_opened(self._state), timeout, f"session {self.id} was not opened")

    async def send(self, chunk: object = None, *, end: bool = False, timeout: float | None = None) -> Answer:
        """Send a chunk and wait for the frames that became final with it, possibly none.

        `chunk` is `[frames, …]` for a model with one input and a dict of such by name otherwise. `end` ends the
        sequence with this chunk, which may be None, and flushes what is held back. After a `DeadlineExceeded` the chunk
        may still be run; the next one follows it.
        """
        try:
            async with asyncio.timeout(timeout):
                result = await (await self._send(chunk, end))
        except TimeoutError:
            raise DeadlineExceeded(f"a chunk of session {self.id} was not answered within {timeout} s") from None
        return await self._answer(result)

    async def stream(
        self, chunks: Iterable[object] | AsyncIterable[object], *, in_flight: int = 8
    ) -> AsyncIterator[Answer]:
        """Send `chunks` and yield the frames that became final with each: one answer for each chunk, and one more.

        The last answer is what an empty chunk flushes, which ends the sequence when `chunks` is exhausted; so a chunk
        never waits for the next one. `chunks` is iterated in a task of its own, at most `in_flight` ahead of what was
        yielded, so that it may be a live source; a live one must be asynchronous, as a blocking one would hold the
        loop. What it raises is raised here, after the answers to what came before.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}; it must be at least 1")
        answers: asyncio.Queue[asyncio.Future[Result] | None] = asyncio.Queue()
        room = asyncio.Semaphore(in_flight)
        ended = self._connection.watch(self._state)
        ended.add_done_callback(answers.put_nowait)
        feeder = asyncio.create_task(self._feed(chunks, answers, room), name="carousel-feeder")
        try:
            while (answer := await answers.get()) is not None:
                result = await answer
                room.release()
                yield await self._answer(result)
            await feeder
        finally:
            self._state.unwatch(ended)
            _forget(ended)
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    _forget(answer)

    async def _feed(
        self,
        chunks: Iterable[object] | AsyncIterable[object],
        answers: asyncio.Queue[asyncio.Future[Result] | None],
        room: asyncio.Semaphore,
    ) -> None:
        try:
            source = aiter(chunks) if isinstance(chunks, AsyncIterable) else _asynchronous(chunks)
            more = True
            while more:
                await room.acquire()
                chunk = await anext(source, _EXHAUSTED)
                more = chunk is not _EXHAUSTED
                answers.put_nowait(await self._send(chunk if more else None, not more))
        finally:
            # The error, if one came, is raised where this task is awaited.
            answers.put_nowait(None)

    async def _send(self, chunk: object, end: bool) -> asyncio.Future[Result]:
        message = Chunk(end=end)
        self._signature.encode_chunk(message.tensors, chunk, end=end)
        async with self._sending:
            return await self._connection.send(self._state, message)

    def _opened(self) -> Opened:
        if self._state.opened is None:
            raise FailedPrecondition(f"session {self.id} is not open yet; await session.ready() first")
        return self._state.opened

    async def _answer(self, result: Result) -> Answer:
        # The newest version may be a newer one than when this client asked.
        if (version := self._opened().version) != self._signature.version:
            self._signature = await self._connection.signature(self._options.model, version)
        return self._signature.decode_chunk(result)


async def _asynchronous(chunks: Iterable[object]) -> AsyncIterator[object]:
    for chunk in chunks:
        yield chunk


async def _wait(answer: asyncio.Future[T], timeout: float | None, what: str) -> T:
    try:
        return await asyncio.wait_for(answer, timeout)
    except TimeoutError:
        raise DeadlineExceeded(f"{what} within {timeout} s") from None


def _forget(answer: asyncio.Future[T]) -> None:
    """Nobody waits for `answer` any more: asyncio need not complain of its error."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()
