"""The engine: models and sessions together, for whatever process hosts them. asyncio, and no gRPC."""

import asyncio
import time
from contextlib import suppress
from uuid import uuid4

from numpy import int32
from numpy.typing import NDArray

from carousel_protos.v1.manifest_pb2 import Policy
from carousel_server.config import ServerConfig
from carousel_server.engine.asked import Asked
from carousel_server.engine.budget import Budget
from carousel_server.engine.catalogue import Catalogue, Entry
from carousel_server.engine.cold import ColdSessions
from carousel_server.engine.events import Sink
from carousel_server.engine.keeper import Keeper
from carousel_server.engine.model import Model
from carousel_server.engine.portable import unseal
from carousel_server.engine.resident import Resident
from carousel_server.engine.retirement import Retired, Retirement
from carousel_server.engine.session import Session
from carousel_server.engine.sessions import Sessions
from carousel_server.engine.spec import Array
from carousel_server.engine.view import SessionView
from carousel_server.errors import CarouselError, DrainingError
from carousel_server.store.open_store import open_store
from carousel_server.store.store import Record

# Seconds that models and the store are given to stop, where nobody says.
_STOP_S = 5.0
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
        # Of what waits to be run, or to be read by clients.
        self.budget = Budget(config.max_pending_bytes)
        self.catalogue = Catalogue(config, self.budget, on_closed=self.sessions.forget)
        if self.keeper is not None:
            self.cold = ColdSessions(self.sessions, self.catalogue, self.keeper, config)
        may_leave = self.cold.may_leave if self.cold is not None else lambda _: True
        self._retirement = Retirement(self.sessions, self.catalogue, may_leave)
        self.draining = False
        # Sessions that the store did not take before it began to drain.
        self._lost_before = 0
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
        asked = Asked(
            session_id=session_id,
            owner=owner,
            model=model,
            version=version,
            policy=policy,
            resume=resume,
            holder=holder,
            epoch=epoch,
        )
        resident = self.sessions.reopened(asked)
        if resident is not None:
            has = resident.model
            former = self.catalogue.former(has.name, has.version)
            asked.check_same(has.name, has.version, resident.session.blocking, former)
            self.sessions.resume(resident, sink, now, holder)
            resident.session.acknowledge(acknowledged)
        else:
            self._refuse_if_draining()
            served = self.catalogue.get(model, version)
            resident = self.sessions.open(
                served,
                session_id,
                policy,
                initial_state,
                context,
                sink,
                now,
                variant=variant,
                owner=owner,
                holder=holder,
            )
        if self.cold is not None:
            self.cold.taken(resident.session.id, sink)
        return resident.session, resident.model

    async def bring(self, asked: Asked) -> None:
        """Have what the store knows of a session in memory, and room for a new one, for `open`.

        See `ColdSessions.bring`.
        """
        if self.cold is not None:
            await self.cold.bring(asked)

    async def bring_held(self, sink: Sink, session_id: str) -> None:
        """Have a session in memory again that this stream holds, for `submit` and `close`."""
        if self.cold is not None:
            await self.cold.bring_held(session_id, sink)

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
        found = await self._look(session_id, owner)
        return found.payload if isinstance(found, Record) else found.model.snapshot(found.session)

    async def put_state(
        self, data: bytes, *, session_id: str = "", version: str = "", move: bool = False, owner: str = ""
    ) -> SessionView:
        """A new session that goes on from a state, to be resumed by a stream.

        An empty id or version is the state's own; `move` takes it to a model of the same signature that computes
        something else. Raises what `unseal` and `Sessions.put` raise.
        """
        self._refuse_if_draining()
        state = unseal(data)
        served = self.catalogue.get(state.model, version or state.version)
        await self.bring(Asked(session_id=session_id or state.session_id, owner=owner))
        resident = self.sessions.put(served, session_id, state, time.monotonic(), owner=owner, move=move)
        return await self._kept(resident)

    async def fork(self, session_id: str, new_session_id: str, *, owner: str = "") -> SessionView:
        """A second session that goes on from the chunk that one answered last, to be resumed by a stream."""
        self._refuse_if_draining()
        new_session_id = new_session_id or uuid4().hex
        await self.bring(Asked(session_id=new_session_id, owner=owner))
        found = await self._look(session_id, owner)
        now = time.monotonic()
        if isinstance(found, Record):  # which stays where it is
            await self.catalogue.prepare(found.model, found.version)
            served, state = self.catalogue.home(found.model, found.version), unseal(found.payload)
            move = served.version != found.version
            resident = self.sessions.put(served, new_session_id, state, now, owner=owner, move=move)
        else:
            resident = self.sessions.fork(found, new_session_id, now)
        return await self._kept(resident)

    async def _look(self, session_id: str, owner: str) -> Record | Resident:
        """A live session, in memory or in the store. Raises what `Sessions.find` and `ColdSessions.look` raise."""
        found = await self.cold.look(session_id, owner) if self.cold is not None else None
        return found if isinstance(found, Record) else self.sessions.find(session_id, owner)

    async def _kept(self, resident: Resident) -> SessionView:
        """A session that no client can open anew by itself: it is written before anybody is told of it."""
        view = SessionView.of_resident(resident, time.monotonic())
        if self.keeper is not None:
            self.keeper.changed(resident.session)
            await self.keeper.settled(resident.session)
        return view

    async def list_sessions(self, *, model: str, after: str, most: int, owner: str = "") -> list[SessionView]:
        """The owner's sessions by id, at most `most` of them behind `after`, also those that only the store has."""
        now = time.monotonic()
        here = [SessionView.of_resident(each, now) for each in self.sessions.page(owner, model, after, most)]
        if self.cold is None:
            return here
        beyond = here[-1].session_id if len(here) == most else None
        cold = await self.cold.views(owner, model, after, most, beyond)
        views = {view.session_id: view for view in (*here, *cold)}
        return [views[session_id] for session_id in sorted(views)[:most]]

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

    async def settle(self, sink: Sink) -> None:
        """Have the store know the sessions that a stream holds as they are: another server may take them up then."""
        if self.keeper is not None:
            held = self.sessions.held(sink)
            self.keeper.save_unstored(held)
            for session in held:
                with suppress(CarouselError):  # it was lost, and whoever takes it up is told
                    await self.keeper.settled(session)

    async def drain(self, deadline: float) -> list[str]:
        """Take nothing new; come back once no stream holds a session and no request waits.

        With a store, streams should have stopped asking: it comes back once all that they asked is answered, and
        written. At the deadline, on the monotonic clock, it comes back in any case; what was left undone, in words.
        """
        self.draining = True
        if self.cold is not None and self.keeper is not None:
            self._lost_before = self.keeper.lost
            self.cold.save_all()
        # Polled: it happens once in a process's life, and sessions need no event for it.
        while self._busy() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        counted = (
            (0 if self.cold is not None else self.sessions.attached, "sessions had not ended, and are gone"),
            (self.sessions.busy, "sessions waited for answers"),
            (self.catalogue.infer_rows, "rows of infer calls waited for answers"),
        )
        return [f"{count} {what}" for count, what in counted if count]

    async def load(self, model: str, version: str) -> Entry:
        """Load what is on disk; see `Catalogue.load`."""
        self._refuse_if_draining()
        return await self.catalogue.load(model, version)

    async def unload(
        self, model: str, version: str, *, within_s: float | None = None, move: bool = False, move_to: str = ""
    ) -> Retired:
        """Serve a version, or every one, no more; see `Retirement.retire`."""
        self._refuse_if_draining()
        given_s = self._config.retire_timeout_s if within_s is None else within_s
        return await self._retirement.retire(model, version, within_s=given_s, move=move, move_to=move_to)

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise DrainingError("this server is stopping; ask another", retry_after_s=1.0)

    def _busy(self) -> bool:
        if self.catalogue.infer_rows:
            return True
        if self.keeper is None:
            return self.sessions.attached > 0
        return self.sessions.busy > 0 or bool(self.keeper.unwritten)

    def _lost(self, session: Session, sink: Sink | None, error: CarouselError) -> None:
        self.sessions.lose(session, sink, error)

    async def stop(self, deadline: float | None = None) -> list[str]:
        """End every model after its running step, and write what is left in memory.

        All of it by the deadline, on the monotonic clock (None: a few seconds); what was left undone, in words.
        """
        deadline = deadline or time.monotonic() + _STOP_S
        undone = []
        if self._sweeper is not None:
            self._sweeper.cancel()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.catalogue.shut()
        except TimeoutError:
            undone.append("a step of a model did not end")
        if self.cold is not None and self.keeper is not None:
            self.cold.save_all()
            await self.keeper.stop(deadline)
            unstored = {resident.session for resident in self.sessions.all() if not resident.session.stored}
            if count := len(self.keeper.unwritten | unstored) + self.keeper.lost - self._lost_before:
                undone.append(f"{count} sessions could not be written to the store")
        return undone

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._config.idle_timeout_s / 4, self._config.cold_after_s / 4))
            self.sessions.expire(time.monotonic())
            if self.cold is not None:
                await self.cold.sweep(time.monotonic())
