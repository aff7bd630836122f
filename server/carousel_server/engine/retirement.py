"""How a version leaves: it takes no new sessions; those that it has finish, move to another version, or are ended."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from carousel_protos.v1.carousel_pb2 import ModelState
from carousel_server.engine.catalogue import Catalogue, Entry
from carousel_server.engine.model import Model
from carousel_server.engine.resident import Resident
from carousel_server.engine.sessions import Sessions
from carousel_server.errors import CarouselError, InvalidError, ModelLoadingError, MoveError, RetiredError

log = logging.getLogger("carousel")

# Seconds between two looks at the sessions of a version: those that have to leave, and those that may finish.
_SOON_S, _LOOK_S = 0.005, 0.1
# Sessions that move or end in one go, before others get their turn.
_TURN = 20


@dataclass
class Retired:
    """What became of versions that were unloaded, as far as it is known."""

    entries: list[Entry]
    moved: int = 0
    # The sessions that could not move, and why.
    staying: dict[str, str] = field(default_factory=dict)


class Retirement:
    """Use within one event loop. `may_leave` says whether nobody is about to take up a session."""

    def __init__(self, sessions: Sessions, catalogue: Catalogue, may_leave: Callable[[Resident], bool]) -> None:
        self._sessions = sessions
        self._catalogue = catalogue
        self._may_leave = may_leave

    async def retire(self, name: str, version: str, *, within_s: float, move: bool, move_to: str) -> Retired:
        """Serve a version, or every one, no more: at once where it has no sessions, else within `within_s` seconds.

        With `move` it comes back once the sessions that can have moved to `move_to`, or to the newest version that
        takes sessions. Raises `ModelNotFoundError`, `ModelLoadingError`, `MoveError`, `InvalidError`.
        """
        if not 0 <= within_s < math.inf:
            raise InvalidError(f"the deadline is {within_s} s; it is 0 or more")
        entries = [self._catalogue.entry(name, version)] if version else self._catalogue.entries(name)
        target = self._target(entries, version, move_to) if move else None
        for entry in entries:
            if entry.state == ModelState.MODEL_STATE_LOADING:
                raise ModelLoadingError(
                    f"version {entry.version} of model {name!r} is loading; try again", model=name, retry_after_s=1.0
                )
        retired = Retired(entries)
        # No await before the last of them takes no new sessions.
        for entry in entries:
            self._catalogue.retire(entry, time.time() + within_s, successor=target)
        for entry in entries:
            if entry.model is not None:
                moved = asyncio.get_running_loop().create_future()
                retirement = entry.retirement = asyncio.create_task(
                    self._retire(entry, entry.model, time.monotonic() + within_s, target, retired, moved),
                    name=f"retirement of {name}/{entry.version}",
                )
                await asyncio.wait([moved, retirement], return_when=asyncio.FIRST_COMPLETED)
        return retired

    def _target(self, entries: list[Entry], version: str, move_to: str) -> str:
        """The version that sessions move to."""
        name = entries[0].name
        if not version:
            raise InvalidError(f"name the version of {name!r} whose sessions are to move")
        others = [
            entry.version for entry in self._catalogue.entries(name) if entry.takes_sessions and entry not in entries
        ]
        if not others or (move_to and move_to not in others):
            raise MoveError(
                f"sessions of version {version} of {name!r} cannot move to {move_to or 'another version'}: "
                f"{', '.join(others) or 'no other'} is served; load it first",
                model=name,
            )
        return move_to or others[-1]

    async def _retire(
        self,
        entry: Entry,
        model: Model,
        until: float,
        target: str | None,
        retired: Retired,
        moved: asyncio.Future[None],
    ) -> None:
        try:
            while True:
                if target is not None:  # those that came back from the store meanwhile among them
                    await self._move(model, target, retired)
                left_s = until - time.monotonic()
                if not model.open_sessions or left_s <= 0:
                    break
                if not moved.done():
                    moved.set_result(None)
                await asyncio.sleep(min(_LOOK_S, left_s))
            await self._end(model)
        finally:
            for resident in self._sessions.of(model):  # where the version stays after all
                self._stay(resident)
        await self._catalogue.withdraw(entry)
        self._sessions.forget_answers([each.model for each in self._catalogue.entries() if each.model is not None])
        log.info("serving %s version %s no more", entry.name, entry.version)

    async def _move(self, model: Model, target: str, retired: Retired) -> None:
        """Take every session that can to `target`, as soon as it is between two chunks."""
        while leaving := [each for each in self._sessions.of(model) if each.session.id not in retired.staying]:
            for number, resident in enumerate(leaving):
                self._move_one(resident, target, retired)
                if number % _TURN == _TURN - 1:
                    await asyncio.sleep(0)
            if self._sessions.of(model):
                await asyncio.sleep(_SOON_S)
        self._sessions.move_answers(model, self._catalogue.home(model.name, target))

    def _move_one(self, resident: Resident, target: str, retired: Retired) -> None:
        session = resident.session
        if self._sessions.peek(session.id) is not resident or not self._may_leave(resident):
            return
        session.leaving = True
        if not session.between_chunks:
            return
        try:
            self._sessions.move(resident, self._catalogue.get(resident.model.name, target))
            retired.moved += 1
        except CarouselError as error:
            retired.staying[session.id] = str(error)
            self._stay(resident)

    @staticmethod
    def _stay(resident: Resident) -> None:
        resident.session.leaving = False
        resident.model.steps.add(resident.session)

    async def _end(self, model: Model) -> None:
        error = RetiredError(
            f"version {model.version} of model {model.name!r} was unloaded and the time of its sessions is over; "
            "open a new one",
            model=model.name,
            version=model.version,
        )
        while left := self._sessions.of(model):
            for number, resident in enumerate(left):
                if self._sessions.peek(resident.session.id) is resident and self._may_leave(resident):
                    self._sessions.end(resident, error)
                if number % _TURN == _TURN - 1:
                    await asyncio.sleep(0)
            if self._sessions.of(model):
                await asyncio.sleep(_SOON_S)
