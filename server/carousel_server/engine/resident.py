"""A session in memory, and what closed ones leave behind for a while: answers that may not have arrived."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from carousel_server.engine.model import Model
from carousel_server.engine.session import Session

# Bytes of answers that closed sessions leave behind, and what a closed session that leaves some counts for besides.
_MOST_BYTES, _SESSION_BYTES = 64 * 1024 * 1024, 4096


@dataclass(slots=True)
class Resident:
    """A session in memory. `last_used` is in seconds of the caller's clock."""

    session: Session
    model: Model
    last_used: float


class Late:
    """Closed sessions whose clients have not acknowledged every answer, the oldest first, within a bound of bytes."""

    def __init__(self) -> None:
        self._residents: OrderedDict[str, tuple[Resident, int]] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str) -> Resident | None:
        found = self._residents.get(session_id)
        return found[0] if found is not None else None

    def add(self, resident: Resident) -> list[Resident]:
        """Keep a session that has closed; those that had to go for it."""
        kept = resident.session.kept
        size = _SESSION_BYTES + sum(len(data) for result in kept for data in result.data if data is not None)
        self._residents[resident.session.id] = resident, size
        self._bytes += size
        gone: list[Resident] = []
        while self._bytes > _MOST_BYTES:
            gone += self.remove(next(iter(self._residents)))
        return gone

    def all(self) -> list[Resident]:
        return [resident for resident, _ in self._residents.values()]

    def remove(self, session_id: str) -> list[Resident]:
        """Forget a session; itself, if it was there."""
        resident, size = self._residents.pop(session_id, (None, 0))
        self._bytes -= size
        return [resident] if resident is not None else []

    def remove_all(self, which: Callable[[Resident], bool]) -> list[Resident]:
        """Forget some; these."""
        names = [name for name, (resident, _) in self._residents.items() if which(resident)]
        return [resident for name in names for resident in self.remove(name)]
