"""The engine: models and sessions together, for whatever process hosts them. asyncio, and no gRPC."""

import asyncio
import time

from numpy import int32
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Policy
from carousel_server.config import ServerConfig
from carousel_server.engine.catalogue import Catalogue, Entry
from carousel_server.engine.cold import ColdSessions
from carousel_server.engine.events import Sink
from carousel_server.engine.keeper import Keeper
from carousel_server.engine.model import Model
from carousel_server.engine.portable import unseal
from carousel_server.engine.resident import Resident
from carousel_server.engine.session import Session
from carousel_server.engine.sessions import Sessions
from carousel_server.engine.spec import Array
from carousel_server.errors import CarouselError, DrainingError, SessionDiffersError, shorten
from carousel_server.store.open_store import open_store

# Seconds between two looks for idle sessions, at most.
_SWEEP_S = 5.0


class Engine:
    """Use within one event loop: `start`, then any of the others, then `drain` and `stop`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        # What keeps sessions beyond this process, and those that only it has; None where all is in memory.
        self.keeper: Keeper | None = None
        self.cold: ColdSessions | None = None
        if config.store != "memory":
            self.keeper = Keeper(
                open_store(config.store),
                each_step=config.durability == "step",
                lifetime_s=config.idle_timeout_s,
                patience_s=config.store_patience_s,
                on_lost=self._lost,
            )
        self.sessions = Sessions(config, self.keeper)
        self.catalogue = Catalogue(config, on_closed=self.sessions.forget)
        if self.keeper is not None:
            self.cold = ColdSessions(self.sessions, self.catalogue, self.keeper, config)
        self.draining = False
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the newest version of each model, one after the other."""
        if self.keeper is not None:
            self.keeper.start()
        self._sweeper = asyncio.create_task(self._sweep(), name="expiry")
        await self.catalogue.load_newest()

    def open(
        self,
        sink: Sink,
        *,
        session_id: str,
        model: str,
        version: str,
        policy: Policy | None,
        resume: bool,
        initial_state: dict[str, Array],
        context: dict[str, Array],
        variant: str = "",
        owner: str = "",
        holder: str = "",
        epoch: int | None = None,
        acknowledged: int | None = None,
    ) -> tuple[Session, Model]:
        """A new session, or with `resume` one that is there, whose answers go to `sink`.

        One that `holder` opened or took up last is taken up again, `resume` or not; with an `epoch`, no other's is.

        `initial_state` by the states' input names, `context` an array `[…]` for each of the model's contexts.
        `owner` is who asks, here and below: a session is only its owner's.
        """
        now = time.monotonic()
        there = self.sessions.reopened(session_id, owner, resume=resume, holder=holder, epoch=epoch)
        if there is not None:
            _check_same(there, model, version, policy)
            self.sessions.resume(there, sink, now, holder)
            there.session.acknowledge(acknowledged)
            return there.session, there.model
        self._refuse_if_draining()
        served = self.catalogue.get(model, version)
        resident = self.sessions.open(
            served, session_id, policy, initial_state, context, sink, now, variant=variant, owner=owner, holder=holder
        )
        return resident.session, served

    async def bring(self, session_id: str, *, owner: str, resume: bool, holder: str) -> None:
        """Have what the store knows of a session in memory, for `open`; see `ColdSessions.bring`."""
        if self.cold is not None and session_id:
            await self.cold.bring(session_id, owner, resume=resume, holder=holder)

    async def bring_held(self, sink: Sink, session_id: str, *, owner: str) -> None:
        """Have a session in memory again that this stream holds, for `submit` and `close`."""
        if self.cold is not None:
            await self.cold.bring_held(session_id, sink, owner)

    def is_cold(self, sink: Sink, session_id: str) -> bool:
        """Whether a session that this stream holds has left memory: `bring_held` has it back."""
        return self.cold is not None and self.cold.held(session_id, sink)

    @property
    def window(self) -> int:
        """Chunks of a session that may be sent beyond those acknowledged."""
        return self._config.max_pending_chunks

    def submit(
        self,
        sink: Sink,
        session_id: str,
        index: int,
        tensors: dict[str, Array],
        *,
        end: bool,
        owner: str = "",
        acknowledged: int | None = None,
    ) -> None:
        """The session's next chunk, its arrays `[frames, …]` by input name; the answer goes to the sink."""
        resident = self.sessions.use(session_id, sink, time.monotonic(), owner=owner)
        resident.model.submit(resident.session, index, tensors, end=end, acknowledged=acknowledged)

    def close(self, sink: Sink, session_id: str, *, owner: str = "", acknowledged: int | None = None) -> bool:
        """Close once all is answered, which the sink is told; True where it was closed before, and the sink is not."""
        return self.sessions.close(session_id, sink, time.monotonic(), owner=owner, acknowledged=acknowledged)

    async def get_state(self, session_id: str, *, owner: str = "") -> bytes:
        """A session's state as of the chunk that it answered last, sealed; it goes on meanwhile."""
        if self.cold is not None and self.sessions.peek(session_id) is None:
            record = await self.cold.read(session_id, owner)
            if record is not None:
                return record.payload
        resident = self.sessions.find(session_id, owner)
        return resident.model.snapshot(resident.session)

    async def put_state(
        self, data: bytes, *, session_id: str = "", version: str = "", move: bool = False, owner: str = ""
    ) -> Resident:
        """A new session that goes on from a state, to be resumed by a stream.

        An empty id or version is the state's own; `move` takes it to a model of the same signature that computes
        something else. Raises what `unseal` and `Sessions.put` raise.
        """
        self._refuse_if_draining()
        state = unseal(data)
        served = self.catalogue.get(state.model, version or state.version)
        await self.bring(session_id or state.session_id, owner=owner, resume=False, holder="")
        resident = self.sessions.put(served, session_id, state, time.monotonic(), owner=owner, move=move)
        return await self._kept(resident)

    async def fork(self, session_id: str, new_session_id: str, *, owner: str = "") -> Resident:
        """A second session that goes on from the chunk that one answered last, to be resumed by a stream."""
        self._refuse_if_draining()
        await self.bring(new_session_id, owner=owner, resume=False, holder="")
        if self.sessions.peek(session_id) is None:
            await self.bring(session_id, owner=owner, resume=True, holder="")
        resident = self.sessions.find(session_id, owner)
        return await self._kept(self.sessions.fork(resident, new_session_id, time.monotonic()))

    async def _kept(self, resident: Resident) -> Resident:
        """A session that no client can open anew by itself: it is written before anybody is told of it."""
        if self.keeper is not None:
            self.keeper.changed(resident.session)
            await self.keeper.settled(resident.session)
        return resident

    def list_sessions(self, *, model: str, after: str, most: int, owner: str = "") -> list[tuple[Resident, float]]:
        """The owner's sessions by id, at most `most` of them behind `after`, and the seconds that each is idle."""
        now = time.monotonic()
        residents = self.sessions.page(owner, model, after, most)
        return [(resident, now - resident.last_used) for resident in residents]

    def idle(self, sink: Sink) -> bool:
        """Whether this stream has been told all that it waits for."""
        return self.sessions.idle(sink) and (self.keeper is None or not self.keeper.owes(sink))

    def detach(self, sink: Sink) -> None:
        """A stream has ended: its sessions stay, until they are resumed or expire."""
        self.sessions.detach(sink)
        if self.cold is not None:
            self.cold.detach(sink)

    async def infer(
        self,
        model: str,
        version: str,
        tensors: dict[str, Array],
        lengths: NDArray[int32] | None,
        *,
        variant: str = "",
    ) -> tuple[dict[str, Array], str]:
        """Outputs by name for whole sequences `[batch, time, …]`, and the version that gave them."""
        self._refuse_if_draining()
        served = self.catalogue.get(model, version)
        return await served.infer(tensors, lengths, variant=variant), served.version

    async def drain(self) -> None:
        """Take nothing new; come back once no stream holds a session and no request waits, or at the deadline.

        With a store, streams should have stopped asking: it comes back once all that they asked is answered.
        """
        self.draining = True
        deadline = time.monotonic() + self._config.drain_timeout_s
        # Polled: it happens once in a process's life, and sessions need no event for it.
        while self._busy() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def load(self, model: str, version: str) -> Entry:
        """Load what is on disk; see `Catalogue.load`."""
        self._refuse_if_draining()
        return await self.catalogue.load(model, version)

    async def unload(self, model: str, version: str) -> list[Entry]:
        """Serve a model no more; see `Catalogue.unload`."""
        self._refuse_if_draining()
        entries = await self.catalogue.unload(model, version)
        self.sessions.forget_answers([entry.model for entry in self.catalogue.entries() if entry.model is not None])
        return entries

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise DrainingError("this server is stopping; ask another", retry_after_s=1.0)

    def _busy(self) -> bool:
        waits = self.sessions.attached if self.cold is None else self.sessions.busy
        return bool(waits or self.catalogue.infer_rows)

    def _lost(self, session: Session, sink: Sink | None, error: CarouselError) -> None:
        self.sessions.lose(session, sink, error)

    async def stop(self) -> None:
        """End every model after its running step, and write what is left in memory."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.catalogue.shut()
        if self.cold is not None and self.keeper is not None:
            await self.cold.save_all()
            await self.keeper.stop()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._config.idle_timeout_s / 4, self._config.cold_after_s / 4))
            self.sessions.expire(time.monotonic())
            if self.cold is not None:
                await self.cold.sweep(time.monotonic())


def _check_same(resident: Resident, model: str, version: str, policy: Policy | None) -> None:
    """Raise `SessionDiffersError` where a resume names another model, version or policy than the session has."""
    has = resident.model
    kind = resident.session.blocking.kind
    if model not in ("", has.name) or version not in ("", has.version):
        raise SessionDiffersError(
            f"session {resident.session.id} is on version {has.version} of {has.name}, not on {shorten(version)} of "
            f"{shorten(model)}; resume it as it is, or open a new one"
        )
    if policy is not None and policy.kind not in (0, kind):
        raise SessionDiffersError(
            f"session {resident.session.id} runs under {resident.session.blocking}; leave policy out"
        )
