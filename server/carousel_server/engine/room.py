"""Room in memory where there is a store: which sessions leave for it, and when."""

import asyncio
import time
from collections.abc import Callable

from carousel_server.config import Limits
from carousel_server.engine.keeper import Keeper
from carousel_server.engine.resident import Resident
from carousel_server.engine.sessions import Sessions
from carousel_server.errors import TooManySessionsError

# Above this share of the sessions that memory may hold, those unused for longest leave.
_HIGH = 0.9
# Sessions that leave in one go, before others get their turn.
_TURN = 200
# Seconds that one that wants room waits for others to be answered and written, and between two looks at them.
_PATIENCE_S, _LOOK_S = 5.0, 0.005


class Room:
    """`may_leave` says whether nobody is about to take up a session; `on_left` is told before one is let go."""

    def __init__(
        self,
        sessions: Sessions,
        keeper: Keeper,
        limits: Limits,
        may_leave: Callable[[Resident], bool],
        on_left: Callable[[Resident], None],
    ) -> None:
        self._sessions = sessions
        self._keeper = keeper
        self._limits = limits
        self._may_leave = may_leave
        self._on_left = on_left
        # Those that want room stand in line for it.
        self._line = asyncio.Lock()

    async def make(self) -> None:
        """Come back when one more session can be in memory. Raises `TooManySessionsError` where none leaves for it."""
        most = self._limits.max_sessions
        if len(self._sessions) < most:
            return
        async with self._line:
            deadline = time.monotonic() + _PATIENCE_S
            while len(self._sessions) >= most:
                surplus = len(self._sessions) - min(int(_HIGH * most), most - 1)
                for resident in self._by_use():
                    surplus -= self._let_go(resident)
                    if surplus <= 0:
                        break
                if len(self._sessions) < most:
                    return
                if time.monotonic() > deadline:
                    raise TooManySessionsError(
                        f"{most} sessions are in use and no more are allowed at once; try later", retry_after_s=1.0
                    )
                await asyncio.sleep(_LOOK_S)

    async def sweep(self, now: float) -> None:
        """Those unused for long leave, and as many more as memory is too full by."""
        residents = self._by_use()
        surplus = len(residents) - int(_HIGH * self._limits.max_sessions)
        for number, resident in enumerate(residents):
            if number >= surplus and now - resident.last_used < self._limits.cold_after_s:
                break
            if self._sessions.peek(resident.session.id) is resident:
                self._let_go(resident)
            if number % _TURN == _TURN - 1:
                await asyncio.sleep(0)

    def _by_use(self) -> list[Resident]:
        """Those unused for longest first."""
        return sorted(self._sessions.all(), key=lambda resident: resident.last_used)

    def _let_go(self, resident: Resident) -> bool:
        """Whether it leaves, or is being written and leaves when it is looked at next: nobody waits for it."""
        session = resident.session
        if not session.idle or session.queued or not self._may_leave(resident):
            return False
        if self._keeper.holds(session):
            return True
        if not session.stored:
            self._keeper.save(session)
            return True
        self._on_left(resident)
        self._keeper.leave(session)
        self._sessions.evict(resident)
        return True
