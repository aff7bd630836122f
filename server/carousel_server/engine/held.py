"""Sessions that a stream holds and that have left memory: whose chunk brings them back, and when they are over."""

from dataclasses import dataclass

from carousel_server.engine.events import Sink
from carousel_server.engine.session import Session


@dataclass(frozen=True, slots=True)
class Hold:
    """A stream's hold on a session that only the store has."""

    sink: Sink
    # What the store had when it left: with a newer one, another has taken the session since.
    epoch: int
    owner: str
    # In seconds of the caller's clock.
    since: float


class Holds:
    """By session id, those that left memory first in front."""

    def __init__(self) -> None:
        self._holds: dict[str, Hold] = {}
        self._of: dict[Sink, set[str]] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, session: Session, sink: Sink, now: float) -> None:
        self.take(session.id)
        self._holds[session.id] = Hold(sink, session.known_epoch, session.owner, now)
        self._of.setdefault(sink, set()).add(session.id)

    def get(self, session_id: str) -> Hold | None:
        return self._holds.get(session_id)

    def take(self, session_id: str) -> Hold | None:
        """The hold, which is over."""
        if (hold := self._holds.pop(session_id, None)) is not None:
            ids = self._of[hold.sink]
            ids.remove(session_id)
            if not ids:
                del self._of[hold.sink]
        return hold

    def detach(self, sink: Sink) -> None:
        """A stream has ended."""
        for session_id in self._of.pop(sink, ()):
            del self._holds[session_id]

    def take_before(self, time: float) -> list[tuple[str, Hold]]:
        """Those of sessions that left memory before this, which are over."""
        over: list[tuple[str, Hold]] = []
        for session_id, hold in self._holds.items():
            if hold.since > time:
                break
            over.append((session_id, hold))
        for session_id, _ in over:
            self.take(session_id)
        return over
