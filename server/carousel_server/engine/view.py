"""What is said of a session in a list, whether it is in memory or in the store alone."""

from dataclasses import dataclass

from carousel_server.engine.keeper import idle_s
from carousel_server.engine.policy import Blocking
from carousel_server.engine.portable import unseal
from carousel_server.engine.resident import Resident
from carousel_server.store.store import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """`carousel.v1.SessionInfo` says what each field is."""

    session_id: str
    model: str
    version: str
    variant: str
    blocking: Blocking
    epoch: int
    next_index: int
    idle_s: float
    attached: bool

    @classmethod
    def of_resident(cls, resident: Resident, now: float) -> "SessionView":
        session = resident.session
        return cls(
            session_id=session.id,
            model=resident.model.name,
            version=resident.model.version,
            variant=session.variant,
            blocking=session.blocking,
            epoch=session.epoch,
            next_index=session.next_index,
            idle_s=now - resident.last_used if session.idle else 0.0,
            attached=session.sink is not None,
        )

    @classmethod
    def of_record(cls, record: Record, lifetime_s: float, *, attached: bool) -> "SessionView":
        state = unseal(record.payload)
        return cls(
            session_id=record.session_id,
            model=record.model,
            version=record.version,
            variant=state.variant,
            blocking=Blocking(state.policy.kind, state.policy.block, state.policy.ahead),
            epoch=record.epoch,
            next_index=state.next_index,
            idle_s=idle_s(record, lifetime_s),
            attached=attached,
        )
