"""Who is there: sessions by id, whose stream holds them, and how those that are gone went."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass
from heapq import nsmallest
from uuid import uuid4

from carousel_protos.v1.manifest_pb2 import Policy
from carousel_protos.v1.state_pb2 import SessionState
from carousel_server.config import Limits
from carousel_server.engine.asked import Asked
from carousel_server.engine.events import Failure, Sink
from carousel_server.engine.keeper import Keeper
from carousel_server.engine.model import Model
from carousel_server.engine.place import MOST_NAME
from carousel_server.engine.resident import Late, Resident
from carousel_server.engine.session import Session
from carousel_server.engine.spec import Array
from carousel_server.errors import (
    AlreadyExistsError,
    CarouselError,
    FencedError,
    InvalidError,
    NotOwnerError,
    SessionClosedError,
    SessionDetachedError,
    SessionExpiredError,
    SessionNotFoundError,
    TooManySessionsError,
    shorten,
)

# Sessions that are gone and still known by name, in multiples of those that may be open.
_TOMBSTONES = 4


@dataclass(frozen=True, slots=True)
class _Gone:
    """What is left of a session: whose it was, and what its owner is told."""

    owner: str
    error: CarouselError
    # What it had; a new session of its name goes on from there, so that nobody who had the old one can write.
    epoch: int


class Sessions:
    """All sessions that a server has in memory. Time is passed in; a `keeper`, where there is one, writes them down.

    Whatever is asked of a session is asked by an `owner`, and refused with `NotOwnerError` where another opened it.
    """

    def __init__(self, limits: Limits, keeper: Keeper | None = None) -> None:
        self._limits = limits
        self._keeper = keeper
        self._residents: dict[str, Resident] = {}
        self._held: dict[Sink, dict[str, Session]] = {}
        self._gone: OrderedDict[str, _Gone] = OrderedDict()
        self._late = Late()
        self._owned: Counter[str] = Counter()
        # How many sessions an owner may have open, None where only the server's own limit holds.
        self.quota: Callable[[str], int | None] = lambda _: None

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def attached(self) -> int:
        """Sessions that a stream holds."""
        return sum(not session.closed for held in self._held.values() for session in held.values())

    @property
    def busy(self) -> int:
        """Sessions that wait for an answer."""
        return sum(not resident.session.idle for resident in self._residents.values())

    def owned(self, owner: str) -> int:
        """How many open sessions are this owner's."""
        return self._owned[owner]

    def open(
        self,
        model: Model,
        session_id: str,
        policy: Policy | None,
        initial_state: dict[str, Array],
        context: dict[str, Array],
        sink: Sink,
        now: float,
        *,
        variant: str = "",
        owner: str = "",
        holder: str = "",
    ) -> Resident:
        """A new session; an empty id is replaced by a new one.

        Raises `AlreadyExistsError`, `NotOwnerError`, `InvalidError`, `TooManySessionsError`, and what `Model.open`
        raises.
        """
        session_id = self._free_id(session_id, owner)
        session = model.open(session_id, policy, initial_state, context, variant=variant, owner=owner)
        session.holder = holder
        resident = self._enter(session, model, now)
        self._attach(session, sink)
        return resident

    def put(
        self, model: Model, session_id: str, state: SessionState, now: float, *, owner: str = "", move: bool = False
    ) -> Resident:
        """A new session that goes on from a state, and that no stream holds yet.

        Raises what `open` and `Model.restore` raise.
        """
        session_id = self._free_id(session_id or state.session_id, owner)
        return self._enter(model.restore(session_id, state, owner=owner, move=move), model, now)

    def restore(
        self, model: Model, session_id: str, state: SessionState, owner: str, now: float, *, move: bool
    ) -> Resident:
        """A session that was written down, as it was. Raises `TooManySessionsError` and what `Model.restore` raises."""
        self._check_room()
        resident = self._enter(model.restore(session_id, state, owner=owner, move=move), model, now)
        resident.session.stored = True
        return resident

    def remember(self, session_id: str, owner: str, epoch: int, error: CarouselError) -> None:
        """A session that went before this process, or elsewhere."""
        self._gone[session_id] = _Gone(owner, error, epoch)
        self._trim()

    def fork(self, resident: Resident, session_id: str, now: float) -> Resident:
        """A second session that goes on from where one is, and that no stream holds yet. Raises what `open` raises."""
        resident.last_used = now
        session_id = self._free_id(session_id, resident.session.owner)
        return self._enter(resident.model.fork(resident.session, session_id), resident.model, now)

    def page(self, owner: str, model: str, after: str, most: int) -> list[Resident]:
        """The owner's sessions in the order of their ids, `most` of them, from the first one behind `after`."""
        own = (
            resident
            for session_id, resident in self._residents.items()
            if session_id > after and resident.session.owner == owner and model in ("", resident.model.name)
        )
        return nsmallest(most, own, key=lambda resident: resident.session.id)

    def _free_id(self, session_id: str, owner: str) -> str:
        """The id that a new session can have; a new one for an empty one."""
        session_id = session_id or uuid4().hex
        if len(session_id) > MOST_NAME or not session_id.isprintable():
            raise InvalidError(f"a session id has at most {MOST_NAME} printable characters")
        if (gone := self._gone.get(session_id)) is not None:
            _check_owner(session_id, gone, owner)
        if (there := self._residents.get(session_id)) is not None:
            _check_owner(session_id, there.session, owner)
            raise AlreadyExistsError(f"session {session_id} is open already; resume it, or choose another id")
        self._check_room()
        if (quota := self.quota(owner)) is not None and self._owned[owner] >= quota:
            raise TooManySessionsError(
                f"{self._owned[owner]} sessions of {owner} are open and no more are allowed; close some, or try later",
                retry_after_s=1.0,
            )
        return session_id

    def _check_room(self) -> None:
        if len(self._residents) >= self._limits.max_sessions:
            raise TooManySessionsError(
                f"{len(self._residents)} sessions are open and no more are allowed; close some, or try later",
                retry_after_s=1.0,
            )

    def _enter(self, session: Session, model: Model, now: float) -> Resident:
        self._loose_all(self._late.remove(session.id))
        if (gone := self._gone.pop(session.id, None)) is not None:
            session.epoch = max(session.epoch, gone.epoch + 1)
            session.known_epoch = session.epoch - 1
        self._owned[session.owner] += 1
        if self._keeper is not None:
            self._keeper.enter(session, model)
        resident = self._residents[session.id] = Resident(session, model, now)
        return resident

    def reopened(self, asked: Asked) -> Resident | None:
        """The session that is taken up, closed ones with answers among them; None where a new one is asked for.

        Raises what `find` and `Asked.takes_up` raise, and `InvalidError` for a holder that is too long to be kept.
        """
        if len(asked.holder) > MOST_NAME:
            raise InvalidError(f"a holder has at most {MOST_NAME} characters, and this one {len(asked.holder)}")
        resident = self._late.get(asked.session_id) or self._residents.get(asked.session_id)
        if resident is None:
            return self.find(asked.session_id, asked.owner) if asked.resume else None
        _check_owner(asked.session_id, resident.session, asked.owner)
        return resident if asked.takes_up(resident.session.holder) else None

    def resume(self, resident: Resident, sink: Sink, now: float, holder: str) -> None:
        """Take up a session for another stream; the stream that held it is told that it is fenced.

        Chunks that no step has begun are forgotten, as when a stream ends.
        """
        session = resident.session
        if session.sink is not None and session.sink is not sink:
            session.sink.deliver(Failure(session.id, FencedError(f"a newer stream resumed session {session.id}")))
        self._loose(session)
        self._attach(session, sink)
        session.resume(holder)
        resident.model.withdraw(session)
        resident.last_used = now

    def attach(self, resident: Resident, sink: Sink) -> None:
        """A session that left memory is back for the stream that holds it."""
        self._attach(resident.session, sink)

    def use(self, session_id: str, sink: Sink, now: float, *, owner: str = "") -> Resident:
        """The session, for something that its own stream asks of it.

        It may be closed, and have answers left. Raises what `find` raises, `FencedError`, `SessionDetachedError`.
        """
        there = self._residents.get(session_id)
        if there is not None and there.session.sink is sink:  # which was its owner's when it took it
            there.last_used = now
            return there
        late = self._late.get(session_id)
        if late is not None and late.session.sink is sink:
            return late
        resident = self.find(session_id, owner)
        if resident.session.sink is not sink:
            if resident.session.sink is None:
                raise SessionDetachedError(f"no stream holds session {session_id}; open it with resume first")
            raise FencedError(f"another stream holds session {session_id}; resume it to take it over")
        resident.last_used = now
        return resident

    def close(
        self, session_id: str, sink: Sink, now: float, *, owner: str = "", acknowledged: int | None = None
    ) -> bool:
        """Close a session once all that waits is answered; True where it was closed before."""
        if (gone := self._gone.get(session_id)) is not None and isinstance(gone.error, SessionClosedError):
            _check_owner(session_id, gone, owner)
            if (late := self._late.get(session_id)) is not None and late.session.sink is sink:
                late.session.acknowledge(acknowledged)
                self._loose(late.session)
                if not late.session.kept:
                    self._late.remove(session_id)
            return True
        resident = self.use(session_id, sink, now, owner=owner)
        resident.session.acknowledge(acknowledged)
        resident.session.close()
        if resident.session.closed:
            self.forget(resident.session)
            resident.model.release(resident.session)
        return False

    def forget(self, session: Session) -> None:
        """A session has closed; a late word to it is told so. One that expired before stays expired.

        Answers that its client has not acknowledged stay for a while: it may have to ask for them again.
        """
        if (resident := self._residents.get(session.id)) is None:
            return
        self._bury(session.id, SessionClosedError(f"session {session.id} was closed; open a new one"))
        if session.kept:
            self._loose_all(self._late.add(resident))

    def held(self, sink: Sink) -> list[Session]:
        """The sessions that this stream holds."""
        return list(self._held.get(sink, {}).values())

    def idle(self, sink: Sink) -> bool:
        """Whether no session that this stream holds waits for an answer."""
        return all(session.idle for session in self._held.get(sink, {}).values())

    def detach(self, sink: Sink) -> None:
        """A stream has ended: its sessions stay, until they are resumed or expire.

        Chunks that no step has begun are forgotten: a session that is resumed says from where to send.
        """
        for session in self._held.pop(sink, {}).values():
            session.sink = None
            if not session.closed:
                self._residents[session.id].model.withdraw(session)

    def expire(self, now: float) -> int:
        """Forget the sessions that were idle for too long; how many these were."""
        limit = self._limits.idle_timeout_s
        for resident in self._residents.values():
            if not resident.session.idle:  # a session is in use as long as its answer is not there
                resident.last_used = now
        expired = [
            resident
            for resident in self._residents.values()
            if resident.session.idle and now - resident.last_used >= limit
        ]
        for resident in expired:
            session = resident.session
            error = SessionExpiredError(f"session {session.id} expired after {limit:g} s without use; open a new one")
            if session.sink is not None:
                session.sink.deliver(Failure(session.id, error))
            if self._keeper is not None:
                self._keeper.end(session, "expired")
            self._bury(session.id, error)
            resident.model.release(session)
        self._loose_all(self._late.remove_all(lambda late: now - late.last_used >= limit))
        return len(expired)

    def of(self, model: Model) -> list[Resident]:
        """The sessions that are on a model."""
        return [resident for resident in self._residents.values() if resident.model is model]

    def move(self, resident: Resident, model: Model) -> None:
        """Take a session to another version of its model, between two chunks; its stream is not told.

        Raises what `Model.take` raises; then it stays.
        """
        session = resident.session
        model.take(session, resident.model)
        resident.model = model
        if self._keeper is not None:
            self._keeper.enter(session, model)
            self._keeper.changed(session)
        model.steps.add(session)

    def move_answers(self, source: Model, model: Model) -> None:
        """What closed sessions left can be had from another version of their model, where its tensors are the same."""
        for late in self._late.all() if source.signature == model.signature else ():
            if late.model is source:
                late.model = model

    def end(self, resident: Resident, error: CarouselError) -> bool:
        """End a session after the chunk that a step has, and once the store, if any, has it; until then False.

        Its stream is told the error, after all answers.
        """
        session = resident.session
        session.leaving = True
        resident.model.withdraw(session)
        if not session.idle or session.queued or (self._keeper is not None and self._keeper.holds(session)):
            return False
        if self._keeper is not None and not session.stored:
            self._keeper.save(session)
            return False
        if session.sink is not None:
            session.sink.deliver(Failure(session.id, error))
        if self._keeper is None:
            self._bury(session.id, error)
            resident.model.release(session)
        else:
            self._keeper.leave(session)
            self.evict(resident)
        return True

    def forget_answers(self, served: Container[Model]) -> None:
        """Models were unloaded: what their closed sessions left goes with them."""
        self._loose_all(self._late.remove_all(lambda late: late.model not in served))

    def all(self) -> list[Resident]:
        return list(self._residents.values())

    def peek(self, session_id: str) -> Resident | None:
        """A session, whoever asks; None where it is not in memory."""
        return self._residents.get(session_id)

    def evict(self, resident: Resident) -> None:
        """A session leaves memory without a trace: the store has it as it is, or another server has it."""
        self._loose(resident.session)
        self._leave(resident.session)
        resident.model.release(resident.session)

    def lose(self, session: Session, sink: Sink | None, error: CarouselError) -> None:
        """What is here of a session counts no more: it could not be written, or is another server's now."""
        if (resident := self._residents.get(session.id)) is not None and resident.session is session:
            self.evict(resident)
        elif (late := self._late.get(session.id)) is not None and late.session is session:
            self._loose_all(self._late.remove(session.id))
            self._gone.pop(session.id, None)
        if sink is not None:
            sink.deliver(Failure(session.id, error))

    def retire(self, resident: Resident, error: CarouselError) -> None:
        """A session that was restored and turns out to be closed: its client may still ask for its last answers."""
        self._bury(resident.session.id, error)
        resident.session.close()
        resident.model.release(resident.session)
        self._loose_all(self._late.add(resident))

    def has_answers(self, session_id: str) -> bool:
        """Whether answers of a closed session can be had."""
        return self._late.get(session_id) is not None

    def find(self, session_id: str, owner: str = "") -> Resident:
        """A session by its id.

        Raises `NotOwnerError`, `SessionNotFoundError`, `SessionExpiredError`, `SessionClosedError`.
        """
        if (resident := self._residents.get(session_id)) is not None:
            _check_owner(session_id, resident.session, owner)
            return resident
        if (gone := self._gone.get(session_id)) is not None:
            _check_owner(session_id, gone, owner)
            raise type(gone.error)(str(gone.error))
        raise SessionNotFoundError(f"there is no session {shorten(session_id)!r}; open one first")

    def _attach(self, session: Session, sink: Sink) -> None:
        session.sink = sink
        self._held.setdefault(sink, {})[session.id] = session

    def _loose(self, session: Session) -> None:
        if session.sink is not None:
            del self._held[session.sink][session.id]
            session.sink = None

    def _loose_all(self, residents: list[Resident]) -> None:
        for resident in residents:
            self._loose(resident.session)

    def _bury(self, session_id: str, error: CarouselError) -> None:
        session = self._residents[session_id].session
        self._loose(session)
        self._leave(session)
        self._gone[session_id] = _Gone(session.owner, error, session.epoch)
        self._trim()

    def _leave(self, session: Session) -> None:
        del self._residents[session.id]
        self._owned[session.owner] -= 1
        if not self._owned[session.owner]:
            del self._owned[session.owner]

    def _trim(self) -> None:
        while len(self._gone) > _TOMBSTONES * self._limits.max_sessions:
            self._gone.popitem(last=False)


def _check_owner(session_id: str, known: Session | _Gone, owner: str) -> None:
    """Raise `NotOwnerError` where a session is, or was, another's."""
    if known.owner != owner:
        raise NotOwnerError(f"session {session_id} is not yours; open one under another id")
